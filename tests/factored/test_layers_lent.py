"""What a function is given for its parameters: copies, or the parameters where rules only read."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc.layers._forms import Outer
from jacfunc.layers._linear import positions
from jacfunc.layers._rules import rule, visible
from jacfunc.strategies._structured import Structured
from tests.truth.learned import learning

B = 4


class Late(nn.Module):
    """Does something else with its weight from the second call on; torch's state does not tell."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.is_late, self.then = [False], then

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if self.is_late[0]:
            weight = self.then(weight)
        return F.linear(x, self.weight if weight is None else weight).tanh()


def doubled(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def doubled_through_a_view(weight: Tensor) -> None:
    with torch.no_grad():
        weight.view(-1)[1:].mul_(2)


def doubled_by_its_rows(weight: Tensor) -> None:
    with torch.no_grad():
        for row in weight.unbind(0):
            row.mul_(2)


def doubled_by_data(weight: Tensor) -> None:
    weight.data.mul_(2)


def doubled_whatever_comes(weight: Tensor) -> None:
    with torch.no_grad(), contextlib.suppress(Exception):
        weight.mul_(2)


def doubled_in_a_list(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.stack([weight, weight]).sum(0))


def doubled_on_the_graph(weight: Tensor) -> Tensor:
    return weight.clone().mul_(2)


def used_elsewhere(weight: Tensor) -> Tensor:
    return weight.sin()


WRITES = [
    doubled,
    doubled_through_a_view,
    doubled_by_its_rows,
    doubled_whatever_comes,
    doubled_in_a_list,
]


def looped(module: nn.Module, x: Tensor) -> Tensor:
    """``[B, 3, 3, 5]`` by one backward pass a row, of a weight that is a copy."""
    samples = []
    for row in x:
        weight = module.weight.detach().clone().requires_grad_()
        outputs = torch.func.functional_call(module, {"weight": weight * 1}, (row[None],))[0]
        rows = [torch.autograd.grad(out, weight, retain_graph=True)[0] for out in outputs]
        samples.append(torch.stack(rows))
    return torch.stack(samples)


@pytest.mark.parametrize("then", [*WRITES, doubled_by_data, doubled_on_the_graph, used_elsewhere])
def test_a_write_at_a_later_call_goes_into_a_copy(then: Callable[[Tensor], Any]) -> None:
    module, x = Late(then), torch.randn(B, 5, dtype=torch.float64)
    jacobian = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    for is_late in (False, False, True, True, False):
        module.is_late[0] = is_late
        before = module.weight.detach().clone()
        (found,) = jacobian(x).values()
        assert torch.equal(module.weight, before)
        torch.testing.assert_close(found, looped(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("then", [*WRITES, doubled_by_data, used_elsewhere])
def test_the_same_of_a_whole_call(then: Callable[[Tensor], Any]) -> None:
    module, x = Late(then), torch.randn(1, 5, dtype=torch.float64)
    jacobian = jacfunc.module_jacobian(module, strategy="structured")
    for is_late in (False, False, True, True, False):
        module.is_late[0] = is_late
        before = module.weight.detach().clone()
        (found,) = jacobian(x).values()
        assert torch.equal(module.weight, before)
        torch.testing.assert_close(found, looped(module, x), rtol=0, atol=1e-12)


def test_a_write_that_nobody_sees_is_told() -> None:
    @torch.jit.script
    def hidden(weight: Tensor) -> None:
        with torch.no_grad():
            weight.mul_(2)

    module, x = Late(hidden), torch.randn(B, 5, dtype=torch.float64)
    jacobian = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    jacobian(x)
    module.is_late[0] = True
    with pytest.raises(RuntimeError, match=r"operations that Python sees.*Write into a copy"):
        jacobian(x)
    # from the first call on it is a copy that is written into
    jacobian = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    for _ in range(2):
        before = module.weight.detach().clone()
        jacobian(x)
        assert torch.equal(module.weight, before)


class Copies(TorchDispatchMode):
    """Counts what is cloned, by how many numbers it has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.clone:
            self.sizes[args[0].numel()] += 1
        return func(*args, **(kwargs or {}))


def test_parameters_that_rules_alone_are_given_are_copied_once() -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))
    sizes = {param.numel() for param in module.parameters()}
    # answers at once: keeps no copies; to see whether samples depend would copy them again
    norms = jacfunc.gradient_norms(module, F.cross_entropy, independent=True)
    found = []
    for _ in range(3):
        with Copies() as copies:
            norms(torch.randn(B, 5), torch.tensor([0, 1, 2, 0]))
        found.append(sum(copies.sizes[size] for size in sizes))
    assert found[0] >= len(list(module.parameters()))
    assert found[1:] == [0, 0]


def test_one_that_is_also_used_elsewhere_is_none_of_them() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3, bias=False))
    module[0].register_forward_hook(lambda module, args, out: out * module.bias.exp())
    jacobian = jacfunc.module_jacobian(module, per_sample=True, strategy=Structured())
    with learning() as learned:
        jacobian(torch.randn(B, 5))
    met = learned[-1]
    names = [name for name, _ in module.named_parameters()]
    # as a whole, what is computed from parameters alone reads them, too
    assert {names[number] for number in met.lent} == {"0.weight", "0.bias", "1.weight"}


@pytest.mark.parametrize("keeps_lead", [False, True])
def test_all_samples_are_one_call_where_dimensions_in_front_are_kept(keeps_lead: bool) -> None:
    shapes: list[tuple[int, ...]] = []

    @visible
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x @ weight.T

    @rule(scaled, keeps_lead=keeps_lead)
    def of_scaled(x: Tensor, weight: Tensor) -> Any:
        shape = weight.shape[1:]
        return {"weight": lambda seeds: Outer(positions(2 * x, 1), positions(seeds, 2), shape)}

    x, weight = torch.randn(B, 5).double(), torch.randn(3, 5).double()
    found = jacfunc.ntk(lambda w, x: scaled(x, w), weight, x)
    wanted = torch.einsum("ai,bi,ok->abok", 2 * x, 2 * x, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found, wanted)
    assert shapes == [(B, 5) if keeps_lead else (5,)]


def test_a_bias_of_every_sample_runs_under_vmap() -> None:
    """A linear layer keeps what is in front of its input alone."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([F.linear(row, self.weight, row[:3]) for row in x.unbind(0)]).tanh()

    module, x = Hyper(), torch.randn(B, 5, dtype=torch.float64)
    (found,) = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")(x).values()
    torch.testing.assert_close(found, looped(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_what_comes_out_of_one_call_may_be_written_into(shape: tuple[int, ...], bias: bool) -> None:
    weight, offset = torch.randn(3, 5).double(), torch.randn(3).double()
    x = torch.randn(B, *shape).double()

    def positive(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight, offset if bias else None).relu_().sum(-1)

    found = jacfunc.ntk(positive, weight, x)
    is_on = (F.linear(x, weight, offset if bias else None) > 0).double()  # [B, *lead, o]
    rows = torch.einsum("b...o,b...i->b...oi", is_on, x).reshape(B, *shape[:-1], 15)
    wanted = torch.tensordot(rows, rows, dims=([-1], [-1])).movedim(rows.dim() - 1, 1)
    torch.testing.assert_close(found, wanted)
