"""Calls by inputs of which earlier ones have settled all but the numbers: what is still checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import jacfunc
from jacfunc._faults.nested import NestedWatch
from jacfunc._traces import FEWEST_CALLS
from tests.modules.test_settled_layers import BEFORE, HIDDEN, calls_until_compared
from tests.modules.test_settled_layers import fresh as fresh  # a fixture of all tests here

COUNT = {"evaluations": 0}
"""Beside the module, whose own state is put back after a call."""
WATCHES: list[NestedWatch] = []


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("shift", torch.ones(2))
        self.scale = 2.0
        self.double()

    def forward(self, x: Tensor) -> Any:
        COUNT["evaluations"] += 1
        y = self.scale * self.inner(x) + self.shift * x[:, :1] ** 2
        match HIDDEN["how"]:
            case "couples":
                return y + x.mean()
            case "draws":
                return nn.functional.dropout(y, 0.5)
            case "writes":
                self.inner[0].weight.detach().numpy()[0, 0] = 7.0
            case "adds":
                self.inner[0].weight.detach().add_(1.0)
            case "looks":
                return y if bool((y > -1e9).all()) else 0 * y
            case "goes apart":
                return y if bool((x[:, 0] > 0).any()) else 2 * y
            case "raises":
                raise ArithmeticError("too large")
            case "returns two":
                return y, y
            case "leaves out":
                return y.detach()
            case "casts":
                return y.float()
        return y


def assert_same(result: Any, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def points(size: int) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64)


def settled(size: int, module: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """A module and its Jacobian, after so many calls that nothing is left to learn."""
    module, options = module or Network(), {"strategy": "reverse", **options}
    jac = jacfunc.module_jacobian(module, "inputs", per_sample=True, **options)
    for _ in range(BEFORE["calls"]):
        jac(points(size))
    return module, jac


def loop(module: Any, x: Tensor) -> Tensor:
    """Plain gradients, one row of one sample after the other."""
    rows = []
    for point in x:
        own = point[None].clone().requires_grad_()
        out = module(own)[0]
        rows.append(
            torch.stack([torch.autograd.grad(y, own, retain_graph=True)[0][0] for y in out])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("size", [1, 5])
def test_module_is_evaluated_once(size: int) -> None:
    module, jac = settled(size)
    x = points(size)
    expected = loop(module, x)
    COUNT["evaluations"] = 0
    assert_same(jac(x), expected)
    assert COUNT["evaluations"] == 1


def test_batches_are_compared_as_often_as_before() -> None:
    jac = jacfunc.module_jacobian(Network(), "inputs", per_sample=True, strategy="reverse")
    more_than_once = []
    for number in range(1, 20):
        COUNT["evaluations"] = 0
        jac(points(4))
        if COUNT["evaluations"] > 1:
            more_than_once.append(number)
    assert more_than_once == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("strategy", ["auto", "reverse"])
@pytest.mark.parametrize("shape", [(2,), (2, 2), ()], ids=str)
def test_shapes_of_outputs(size: int, strategy: str, shape: tuple[int, ...]) -> None:
    class Shaped(Network):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (
                y.sum(1) if not shape else y if len(shape) == 1 else y[:, :, None] * x[:, None, :2]
            )

    module, jac = settled(size, Shaped(), strategy=strategy)
    x = points(size)
    own = x.clone().requires_grad_()
    out = module(own).reshape(size, -1)
    rows = [torch.autograd.grad(y.sum(), own, retain_graph=True)[0] for y in out.T]
    assert_same(jac(x), torch.stack(rows, 1).reshape(size, *shape, 3))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a write": lambda m: m.inner[0].weight.data.mul_(2),
    "numbers elsewhere": lambda m: setattr(m.inner[0].weight, "data", torch.ones(4, 3).double()),
    "a view of them": lambda m: setattr(m.inner[0].bias, "data", m.inner[0].bias.data.flip(0)),
    "another parameter": lambda m: setattr(
        m.inner[2], "bias", nn.Parameter(torch.ones(2).double())
    ),
    "a buffer": lambda m: m.shift.mul_(3),
    "a setting": lambda m: setattr(m, "scale", 5.0),
    "a layer": lambda m: setattr(m.inner, "1", nn.Softplus()),
    "a hook": lambda m: m.inner[1].register_forward_hook(lambda _, __, out: out * 3),
    "the mode": lambda m: m.eval(),
    "a frozen layer": lambda m: m.inner[0].requires_grad_(False),
}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str, size: int) -> None:
    module, jac = settled(size)
    CHANGES[change](module)
    x = points(size)
    for _ in range(2):
        assert_same(jac(x), loop(module, x))


def test_numbers_of_a_module_are_watched_where_they_lie_now() -> None:
    module, jac = settled(5)
    CHANGES["numbers elsewhere"](module)
    jac(points(5))
    HIDDEN["how"] = "writes"
    with pytest.raises(RuntimeError, match="a parameter must be read alone"):
        jac(points(5))
    assert bool((module.inner[0].weight == 1).all())


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("how", ["writes", "adds"])
def test_writes_are_undone_and_told(how: str, size: int) -> None:
    module, jac = settled(size)
    before = module.inner[0].weight.detach().clone()
    HIDDEN["how"] = how
    with pytest.raises(RuntimeError, match="a parameter must be read alone"):
        jac(points(size))
    assert torch.equal(module.inner[0].weight, before)


def test_samples_that_come_to_depend_are_refused() -> None:
    module, jac = settled(5)
    HIDDEN["how"] = "couples"
    for _ in range(calls_until_compared()):  # taken anew, by which each is differentiated alone
        x = points(5)
        assert_same(jac(x), loop(module, x))
    with pytest.raises(ValueError, match="samples that do not depend on each other"):
        jac(points(5))


@pytest.mark.parametrize("size", [1, 5])
def test_draws_are_refused(size: int) -> None:
    _, jac = settled(size)
    HIDDEN["how"] = "draws"
    x, state = points(size), torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="must know how samples draw random numbers"):
        jac(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 5])
def test_errors_are_those_of_the_module(size: int) -> None:
    module, jac = settled(size)
    HIDDEN["how"] = "raises"
    with pytest.raises(ArithmeticError, match="too large") as caught:
        jac(points(size))
    assert any("module_jacobian: the module must run" in note for note in caught.value.__notes__)
    HIDDEN["how"] = ""
    x = points(size)
    for _ in range(3):
        assert_same(jac(x), loop(module, x))


@pytest.mark.parametrize("how", ["looks", "returns two", "leaves out", "casts"])
@pytest.mark.parametrize("size", [1, 5])
def test_another_course_is_taken_anew(how: str, size: int) -> None:
    module, jac = settled(size)
    for turn in (how, "", how, how, how, how, ""):
        HIDDEN["how"] = turn
        fresh = jacfunc.module_jacobian(module, "inputs", per_sample=True)
        x = points(size)
        results = jac(x), fresh(x)
        first, second = (r if isinstance(r, tuple) else (r,) for r in results)
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            assert_same(one, two, 1e-6 if turn == "casts" else 1e-12)


def test_samples_that_alone_go_another_way_are_seen() -> None:
    module = Network()
    HIDDEN["how"] = "goes apart"
    jac = jacfunc.module_jacobian(module, "inputs", per_sample=True, strategy="reverse")
    ahead, apart = points(5).abs(), points(5)
    assert 0 < int((apart[:, 0] > 0).sum()) < 5
    for _ in range(BEFORE["calls"] + 1):
        assert_same(jac(ahead), loop(module, ahead))
    COUNT["evaluations"] = 0
    assert_same(jac(ahead), loop(module, ahead))
    assert COUNT["evaluations"] == 1 + 5  # each sample alone in the loop: here all go one way
    for x in (apart, ahead, apart):
        assert_same(jac(x), loop(module, x))


@pytest.mark.parametrize("size", [1, 4])
def test_results_share_no_memory(size: int) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    _, jac = settled(size, Same())
    x = points(size)
    first, second = jac(x), jac(x)
    first.zero_()
    second[0, 0, 1] = 5.0
    assert_same(jac(x), torch.eye(3, dtype=torch.float64).expand(size, 3, 3), 0.0)


@pytest.mark.parametrize("size", [1, 5])
def test_what_may_catch_errors_stays_watched_until_its_operations_are_compared(size: int) -> None:
    class Catching(Network):
        def forward(self, x: Tensor) -> Any:
            modes = _get_current_function_mode_stack()
            WATCHES.extend(mode for mode in modes if isinstance(mode, NestedWatch))
            try:
                return super().forward(x)
            except ArithmeticError:
                return x

    module, jac = settled(size, Catching())
    x = points(size)
    expected = loop(module, x)
    WATCHES.clear()
    COUNT["evaluations"] = 0
    assert_same(jac(x), expected)
    assert COUNT["evaluations"] == 1
    # a written sweep holds for the same operations alone: see tests/settled/test_watches.py
    assert len(WATCHES) == (0 if BEFORE["calls"] > FEWEST_CALLS else 1)


def test_module_is_left_as_it_was() -> None:
    class Counting(Network):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Any:
            self.count += 1
            self.seen.append(len(x))
            self.last = x
            return super().forward(x)

    module, jac = settled(5, Counting())
    before = dict(vars(module))
    x = points(5)
    jac(x)
    assert module.count == 0
    assert not module.seen
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is before[key] for key in before)


def test_inside_transforms_and_modes() -> None:
    module, jac = settled(5)
    x = points(5)
    expected = loop(module, x)
    with torch.inference_mode():
        assert_same(jac(x).clone(), expected)
    with torch.no_grad():
        assert_same(jac(x), expected)
    many = torch.vmap(jac)(torch.stack([x, 2 * x]))
    assert_same(many[0], expected)
    assert not jac(x.clone().requires_grad_()).requires_grad


def test_independent_that_users_know() -> None:
    module, jac = settled(5, independent=True)
    x = points(5)
    COUNT["evaluations"] = 0
    result = jac(x)
    assert COUNT["evaluations"] == 1
    assert_same(result, loop(module, x))
    _, always = settled(5, independent="always")
    COUNT["evaluations"] = 0
    always(x)
    assert COUNT["evaluations"] > 1
