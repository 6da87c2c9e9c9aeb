"""Calls by parameters of which earlier ones have settled all but the numbers: what is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc

COUNT = {"evaluations": 0, "sweeps": 0}
"""Beside the module, whose own state is put back after a call."""
HIDDEN = {"how": ""}
"""What the module does beside, of which nothing is told."""
KEPT: list[Tensor] = []


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.act: nn.Module = nn.Tanh()
        self.register_buffer("shift", torch.ones(2))
        self.scale = 2.0
        self.double()

    def forward(self, x: Tensor) -> Any:
        COUNT["evaluations"] += 1
        how = HIDDEN["how"]
        y = self.scale * self.last(self.act(self.first(x))) + self.shift * x[:, :1] ** 2
        match how:
            case "couples":
                return y + self.first(x).mean()
            case "draws":
                return nn.functional.dropout(y, 0.5)
            case "writes":
                self.first.weight.detach().numpy()[0, 0] = 7.0
            case "adds":
                with torch.no_grad():
                    self.first.weight.add_(1.0)
            case "twice":
                return y + self.last(self.first(x))
            case "without a rule":
                return y + self.last.weight.sum().sin()
            case "as a view":
                return y + x @ self.first.weight[:2].T
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
            case "kept from before":
                return y + KEPT[0]
            case "counts":
                y.register_hook(lambda grad: COUNT.update(sweeps=COUNT["sweeps"] + 1))
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.lstm(x)[0][:, -1])
        return out


class Tied(nn.Module):
    """A table that is looked up, multiplied, added to, and used by a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 3))
        self.place = nn.Parameter(torch.randn(5, 3))
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.embedding(x, self.table) + self.place[: x.shape[1]]
        h = torch.tanh(h @ (self.mix + self.mix.T))
        return h.mean(1) @ self.table.T


class Layers(nn.Sequential):
    """Layers of torch's in a class of a user's: they are called each time, as that may do more."""


def images() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return Layers(*layers)


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return Layers(layer, nn.Flatten(), nn.Linear(12, 2))


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape, dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear layers": (Network, normal(3)),
    "images": (images, normal(2, 4, 4)),
    "recurrent": (Recurrent, normal(3, 2)),
    "attention": (attention, normal(3, 4)),
    "tied": (Tied, lambda size: torch.randint(6, (size, 4))),
    "one number": (lambda: Layers(nn.Linear(3, 1), nn.Flatten(0)), normal(3)),
    "a matrix": (lambda: Layers(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))), normal(3)),
}


BEFORE = {"calls": 0}
"""So many calls come before the one that is tested."""


@pytest.fixture(autouse=True, params=[5, 24], ids=["settled", "swept as written down"])
def fresh(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    BEFORE["calls"] = request.param
    HIDDEN["how"] = ""
    yield
    HIDDEN["how"] = ""


def calls_until_compared() -> int:
    """How many calls are left until batches are compared again, as at calls 2, 4, 8, …"""
    return 2 ** BEFORE["calls"].bit_length() - BEFORE["calls"] - 1


def points(size: int) -> Tensor:
    return normal(3)(size)


def loop(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Plain gradients, one number of one sample after the other."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for point in x:
        out = module(point[None])[0]
        for y in out.reshape(-1):
            grads = torch.autograd.grad(
                y, [*params.values()], retain_graph=True, materialize_grads=True
            )
            for name, grad in zip(params, grads, strict=True):
                rows[name].append(grad)
    return {
        name: torch.stack(every).reshape(len(x), *out.shape, *params[name].shape)
        for name, every in rows.items()
    }


def assert_same(result: Any, expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(result) == list(expected)
    for name, block in expected.items():
        torch.testing.assert_close(result[name], block, rtol=tolerance, atol=tolerance)


def settled(size: int, strategy: str, module: nn.Module | None = None) -> tuple[Any, Any]:
    """A module and its Jacobian, after so many calls that nothing is left to learn."""
    module = module or Network()
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    for _ in range(BEFORE["calls"]):
        jac(points(size))
    return module, jac


WAYS = pytest.mark.parametrize(
    ("size", "strategy"), [(1, "structured"), (1, "reverse"), (5, "structured"), (5, "reverse")]
)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("strategy", ["auto", "structured", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_is_exact(kind: str, strategy: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double()
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    step = torch.optim.SGD(module.parameters(), lr=0.1)
    for number in range(BEFORE["calls"] + 2):
        x = draw(3 if number == 5 else size)
        assert_same(jac(x), loop(module, x))
        module(x).square().mean().backward()
        step.step()  # the next call finds other numbers
        step.zero_grad()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("strategy", ["structured", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_flat(kind: str, strategy: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double()
    jac = jacfunc.module_jacobian(module, per_sample=True, flat=True, strategy=strategy)
    for _ in range(BEFORE["calls"]):
        x = draw(size)
        rows = [
            block.reshape(size, -1, module.get_parameter(name).numel())
            for name, block in loop(module, x).items()
        ]
        torch.testing.assert_close(jac(x), torch.cat(rows, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4])
def test_by_both(size: int) -> None:
    module = Network()
    ways: Any = {"per_sample": True, "strategy": "structured"}
    jac = jacfunc.module_jacobian(module, ("params", "inputs"), **ways)
    flat = jacfunc.module_jacobian(module, ("params", "inputs"), flat=True, **ways)
    inputs = jacfunc.module_jacobian(module, "inputs", flat=True, **ways)
    for _ in range(BEFORE["calls"] + 1):
        x = points(size)
        by_params, by_inputs = jac(x)
        assert_same(by_params, loop(module, x))
        own = x.clone().requires_grad_()
        rows = [torch.autograd.grad(y.sum(), own, retain_graph=True)[0] for y in module(own).T]
        torch.testing.assert_close(by_inputs, torch.stack(rows, 1), rtol=1e-12, atol=1e-12)
        every = [block.flatten(2) for block in (*by_params.values(), by_inputs)]
        torch.testing.assert_close(flat(x), torch.cat(every, 2), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inputs(x), by_inputs, rtol=1e-12, atol=1e-12)


@WAYS
def test_module_is_evaluated_and_swept_once(size: int, strategy: str) -> None:
    module = Network()
    HIDDEN["how"] = "counts"
    module, jac = settled(size, strategy, module)
    x = points(size)
    COUNT.update(evaluations=0, sweeps=0)
    result = jac(x)
    assert COUNT == {"evaluations": 1, "sweeps": 1}
    HIDDEN["how"] = ""
    assert_same(result, loop(module, x))


def test_batches_are_compared_as_often_as_before() -> None:
    jac = jacfunc.module_jacobian(Network(), per_sample=True, strategy="structured")
    more_than_once = []
    for number in range(1, 20):
        COUNT["evaluations"] = 0
        jac(points(4))
        if COUNT["evaluations"] > 1:
            more_than_once.append(number)
    assert more_than_once == [1, 2, 4, 8, 16]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a write": lambda m: m.first.weight.data.mul_(2),
    "numbers elsewhere": lambda m: setattr(m.first.weight, "data", torch.ones(4, 3).double()),
    "a view of them": lambda m: setattr(m.first.bias, "data", m.first.bias.data.flip(0)),
    "another parameter": lambda m: setattr(m.last, "bias", nn.Parameter(torch.ones(2).double())),
    "a buffer": lambda m: m.shift.mul_(3),
    "a setting": lambda m: setattr(m, "scale", 5.0),
    "a layer": lambda m: setattr(m, "act", nn.Softplus()),
    "a hook": lambda m: m.first.register_forward_hook(lambda _, __, out: out * 3),
    "the mode": lambda m: m.eval(),
    "a frozen layer": lambda m: m.first.requires_grad_(False),
    "one parameter twice": lambda m: setattr(m.first, "bias", nn.Parameter(m.first.weight[:, 0])),
}


@WAYS
@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str, size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    CHANGES[change](module)
    for _ in range(3):
        x = points(size)
        assert_same(jac(x), loop(module, x))


@WAYS
def test_hooks_on_parameters_count(size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    handle = module.first.weight.register_hook(lambda grad: 3 * grad)
    for _ in range(3):
        x = points(size)
        expected = loop(module, x)  # of a leaf the hook runs here, too
        assert_same(jac(x), expected)
    handle.remove()
    x = points(size)
    assert_same(jac(x), loop(module, x))


@WAYS
@pytest.mark.parametrize("how", ["twice", "without a rule", "as a view", "looks"])
def test_another_course_is_taken_anew(how: str, size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    for turn in (how, "", how, how, how, how, ""):
        HIDDEN["how"] = turn
        x = points(size)
        assert_same(jac(x), loop(module, x))


@WAYS
@pytest.mark.parametrize("how", ["returns two", "leaves out"])
def test_another_output_is_taken_anew(how: str, size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    for turn in (how, "", how, how, how, how, ""):
        HIDDEN["how"] = turn
        x = points(size)
        again = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(x)
        results = jac(x), again
        first, second = (r if isinstance(r, tuple) else (r,) for r in results)
        for one, two in zip(first, second, strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("strategy", ["structured", "reverse"])
def test_samples_that_alone_go_another_way_are_seen(strategy: str) -> None:
    module = Network()
    HIDDEN["how"] = "goes apart"
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    ahead, apart = points(5).abs(), points(5)
    assert 0 < int((apart[:, 0] > 0).sum()) < 5
    for x in (ahead,) * (BEFORE["calls"] + 1) + (apart, ahead, apart):
        assert_same(jac(x), loop(module, x))


@WAYS
def test_outputs_of_before_the_call_are_refused(size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    KEPT[:] = [module.first.bias.sum() * 2]
    HIDDEN["how"] = "kept from before"
    with pytest.raises(ValueError, match="what was computed before"):
        jac(points(size))


@WAYS
@pytest.mark.parametrize("how", ["writes", "adds"])
def test_writes_go_into_copies(how: str, size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    before, x = module.first.weight.detach().clone(), points(size)
    expected = loop(module, x)
    HIDDEN["how"] = how
    for _ in range(2):
        assert_same(jac(x), expected)
        assert torch.equal(module.first.weight, before)


FIRST = slice(0, 1)
ARGUMENTS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]] = {
    "dimensions": (lambda h, dim: h.softmax(dim), -1, -2),  # which have the same hash
    "names": (lambda h, names: h.flip(**names) * h, {"dims": [-1]}, {"dims": [-2]}),
    "slices": (lambda h, index: h - h[index], (slice(None), FIRST), (FIRST, slice(None))),
    "a slice alone": (lambda h, index: h - h[index], (slice(None), FIRST), FIRST),
}
"""Operations with a value by which they do not mix the samples, and with one by which they do."""


@pytest.mark.parametrize("strategy", ["structured", "reverse"])
@pytest.mark.parametrize("which", ARGUMENTS)
def test_values_that_nobody_sees_are_compared(which: str, strategy: str) -> None:
    operation, apart, mixing = ARGUMENTS[which]
    chosen = [apart]

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(operation(self.first(x), chosen[0]).tanh())

    module = Choosing().double()
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    for _ in range(BEFORE["calls"]):
        jac(points(5))
    chosen[0] = mixing
    x = points(5)
    # taken anew, by which each is differentiated alone
    assert_same(jac(x), loop(module, x))


@pytest.mark.parametrize("strategy", ["structured", "reverse"])
def test_samples_that_come_to_depend_are_refused(strategy: str) -> None:
    module, jac = settled(5, strategy)
    HIDDEN["how"] = "couples"
    x = points(5)
    for _ in range(calls_until_compared()):  # taken anew, by which each is differentiated alone
        assert_same(jac(x), loop(module, x))
    with pytest.raises(ValueError, match="samples that do not depend on each other"):
        jac(x)


@WAYS
def test_draws_are_refused(size: int, strategy: str) -> None:
    _, jac = settled(size, strategy)
    HIDDEN["how"] = "draws"
    x, state = points(size), torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="must know how samples draw random numbers"):
        jac(x)
    assert torch.equal(torch.get_rng_state(), state)


@WAYS
def test_errors_are_those_of_the_module(size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    HIDDEN["how"] = "raises"
    with pytest.raises(ArithmeticError, match="too large"):
        jac(points(size))
    HIDDEN["how"] = ""
    x = points(size)
    for _ in range(3):
        assert_same(jac(x), loop(module, x))


@WAYS
def test_results_share_no_memory(size: int, strategy: str) -> None:
    module = nn.Linear(2, 3).double()
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    x = normal(2)(size)
    for _ in range(BEFORE["calls"]):
        jac(x)
    first, second = jac(x), jac(x)
    for block in first.values():
        block.zero_()
    second["bias"][0, 0, 1] = 5.0
    assert_same(jac(x), loop(module, x))


@WAYS
def test_inside_modes(size: int, strategy: str) -> None:
    module, jac = settled(size, strategy)
    x = points(size)
    expected = loop(module, x)
    with torch.inference_mode():
        result = {name: block.clone() for name, block in jac(x).items()}
    assert_same(result, expected)
    with torch.no_grad():
        assert_same(jac(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rough = jac(x)
    fresh = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(rough, fresh(x), 1e-2)
    many = torch.vmap(jac)(torch.stack([x, 2 * x]))
    assert_same({name: block[0] for name, block in many.items()}, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 5])
def test_other_dtypes_are_as_at_the_first_call(size: int, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x = points(size).to(dtype)
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    first = jac(x)
    for _ in range(BEFORE["calls"]):
        assert_same(jac(x), first, 0.0)
