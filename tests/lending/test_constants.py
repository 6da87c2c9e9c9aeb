"""Parameters that a module is not differentiated by: lent as they are, or copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._lending.constants import constants_of
from tests.kinds.modules import floats

STRATEGIES = ("reverse", "forward", "looped", "auto")


class Writing(nn.Module):
    """``2 W x``, where the weight is doubled in its place, from the second ``quiet`` call on."""

    def __init__(self, write: Callable[[Tensor], object], quiet: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(floats(2, 3))
        self.bias = nn.Parameter(floats(2))
        self.write, self.quiet = write, quiet

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) >= self.quiet:
            self.write(self.weight)
        return x @ self.weight.T + self.bias


def in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def by_data(weight: Tensor) -> None:
    weight.data.mul_(2)


def by_new_data(weight: Tensor) -> None:
    weight.data = weight.data * 2


WRITES = pytest.mark.parametrize("write", [in_place, by_data, by_new_data])


@WRITES
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_evaluation_finds_the_parameters_as_they_were(
    write: Callable[[Tensor], object], strategy: str
) -> None:
    module = Writing(write)
    weight = module.weight.detach().clone()
    jac = jacfunc.module_jacobian(module, "inputs", strategy=strategy)
    if (strategy, write) == ("forward", by_new_data):
        with pytest.raises(NotImplementedError, match="sets the data of a tensor"):
            jac(torch.ones(3, dtype=torch.float64))
        assert torch.equal(module.weight, weight)
        return
    for _ in range(3):
        result = jac(torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(result, 2 * weight)
        assert torch.equal(module.weight, weight)


@WRITES
def test_chosen_parameters_beside_one_that_is_written_into(
    write: Callable[[Tensor], object],
) -> None:
    module = Writing(write)
    weight = module.weight.detach().clone()
    jac = jacfunc.module_jacobian(module, select="bias", per_sample=False)
    for _ in range(3):
        result = jac(torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(result["bias"], torch.eye(2, dtype=torch.float64))
        assert torch.equal(module.weight, weight)


def test_a_write_that_comes_late_is_no_silent_one() -> None:
    module = Writing(in_place, quiet=10.0)
    jac = jacfunc.module_jacobian(module, "inputs", strategy="looped")
    jac(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"got a write into 'weight'.*Keep in a buffer"):
        jac(torch.full((3,), 10.0, dtype=torch.float64))


def test_of_a_large_module_a_write_is_told() -> None:
    module = Writing(in_place)
    constants = constants_of(module)
    constants.most_copied = constants.compared = 4
    with pytest.raises(RuntimeError, match="got a write into 'weight', which has changed it"):
        jacfunc.module_jacobian(module, "inputs", strategy="looped")(torch.ones(3).double())


def test_what_was_seen_is_known_to_who_asks_anew() -> None:
    """``module_jacobian(module)(x)`` in a loop copies once for each mode of the module."""
    seen: list[int] = []
    module = nn.Linear(3, 2)
    module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))

    def ask() -> int:
        jacfunc.module_jacobian(module, "inputs", strategy="looped")(torch.ones(3))
        return seen[-1]

    ask()
    assert ask() == module.weight.data_ptr()
    module.eval()
    ask()
    assert ask() == module.weight.data_ptr()


def test_who_only_reads_gets_no_copies() -> None:
    """From the second call on: the same memory, at every evaluation."""
    seen: list[int] = []
    module = nn.Linear(3, 2)
    module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))
    jac = jacfunc.module_jacobian(module, "inputs", strategy="looped")
    for _ in range(3):
        jac(torch.ones(3))
    own = module.weight.data_ptr()
    first = seen.index(own)
    assert first > 0
    assert seen[first:] == [own] * (len(seen) - first)
    module.weight = nn.Parameter(torch.ones(2, 3))  # nobody has seen what becomes of this one
    jac(torch.ones(3))
    assert seen[-1] != own


def test_copies_of_what_was_only_read_are_not_copied_again() -> None:
    """``ggn`` keeps copies, which are other tensors in each of its calls."""
    seen: list[int] = []
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))
    ggn = jacfunc.ggn(module, nn.functional.mse_loss, select="1.*", independent=True)

    def is_copied_again() -> bool:
        seen.clear()
        result = ggn(torch.ones(4, 3), torch.ones(4, 2))
        result.diagonal()
        kept = result.point.call.state.copies[id(module[0].weight)]
        return seen[0] != kept.data_ptr()

    assert is_copied_again()
    assert not is_copied_again()
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert is_copied_again()
    assert not is_copied_again()


@pytest.mark.filterwarnings("ignore:module_jacobian. create_graph")
def test_new_values_may_be_written_into_where_the_old_were_not() -> None:
    """A network may keep its weights within bounds whenever it is called."""
    module = Writing(lambda weight: weight.data.clamp_(max=1.0))
    module.weight.data.fill_(0.5)
    jac = jacfunc.module_jacobian(module, "inputs", strategy="looped")
    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(jac(x), torch.full((2, 3), 0.5, dtype=torch.float64))
    with torch.no_grad():
        module.weight.fill_(3.0)
    torch.testing.assert_close(jac(x), torch.ones(2, 3, dtype=torch.float64))
    assert module.weight.eq(3.0).all()


def test_a_failed_evaluation_tells_nothing() -> None:
    seen: list[int] = []
    module = nn.Linear(3, 2)
    module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))

    def fail(*_: object) -> None:
        raise ArithmeticError

    failing = module.register_forward_hook(fail)
    jac = jacfunc.module_jacobian(module, "inputs", strategy="looped")
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            jac(torch.ones(3))
    failing.remove()
    own = module.weight.data_ptr()
    jac(torch.ones(3))
    assert own not in seen[:3]
    jac(torch.ones(3))
    assert seen[-1] == own


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "part of a larger one": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_that_torch_does_not_count_is_undone_and_told(layout: str) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    weight = module[0].weight = nn.Parameter(LAYOUTS[layout](floats(3, 2, 3, 3)))
    memory, writes = weight.detach().numpy(), list[int]()

    def write(*_: object) -> None:
        if writes:
            memory[1, 0] *= 2

    module[2].register_forward_pre_hook(write)
    jac, x = jacfunc.module_jacobian(module, "inputs", per_sample=True), floats(3, 2, 4, 4)
    numbers = [jac(x) for _ in range(4)][-1]
    before = weight.detach().clone()
    writes.append(1)
    with pytest.raises(RuntimeError, match=r"got a write into '0.weight', which was undone"):
        jac(x)
    assert torch.equal(weight, before)
    writes.clear()
    torch.testing.assert_close(jac(x), numbers)


@pytest.mark.parametrize("select", [None, "*", ["0.*", "1.*"]], ids=str)
def test_a_choice_by_names_is_made_again_where_others_are_trainable(select: str | None) -> None:
    module, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(4, 3)
    jac = jacfunc.module_jacobian(module, select=select, per_sample=True)
    for _ in range(2):
        assert len(jac(x)) == 4
    module[1].bias.requires_grad_(False)
    for _ in range(2):
        assert len(jac(x)) == 3
    module.requires_grad_(False)
    for _ in range(2):
        if select is not None:
            with pytest.raises(ValueError, match="must match trainable parameters"):
                jac(x)
    module.requires_grad_(True)
    assert len(jac(x)) == 4
