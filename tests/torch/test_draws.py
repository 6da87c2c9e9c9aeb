"""One result is of one draw: what changes between evaluations is refused, whatever draws it."""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc import Forward, Looped
from tests.kinds.losses import half_square

CHANGING = "its outputs change from one evaluation to the next"


class Counter:
    """A number that is another one at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return float(self.calls)


class Private:
    """Draws from a generator that nobody else knows."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self) -> float:
        return float(torch.rand((), generator=self.generator)) + 0.5


class Alternating:
    """Switches with each call."""

    def __init__(self) -> None:
        self.is_on = False

    def __call__(self) -> float:
        self.is_on = not self.is_on
        return 2.0 if self.is_on else 3.0


STATES: dict[str, Callable[[], Callable[[], float]]] = {
    "numpy": lambda: np.random.rand,
    "python": lambda: random.random,
    "generator": Private,
    "counter": Counter,
    "alternating": Alternating,
}
EVERY_STATE = pytest.mark.parametrize("state", STATES)


def point(*shape: int) -> Tensor:
    return torch.linspace(0.5, 1.5, int(np.prod(shape)), dtype=torch.float64).view(shape)


SEVERAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "columns in chunks": lambda f, x: jacfunc.jacfwd(f, chunk_size=1)(x),
    "columns one by one": lambda f, x: jacfunc.jacobian(f, strategy=Looped("columns"))(x),
    "value and columns": lambda f, x: jacfunc.value_and_jacobian(f, strategy=Forward(3))(x),
    "hessian": lambda f, x: jacfunc.hessian(lambda x: f(x**3).sum(), strategy=Forward(1))(x),
    "inside a derivative": lambda f, x: jacfunc.jacrev(
        lambda x: jacfunc.jacfwd(f, chunk_size=3)(x).diagonal()
    )(x),
    "inside vmap": lambda f, x: torch.func.vmap(jacfunc.jacfwd(f, chunk_size=2))(x.expand(3, 4)),
}


@EVERY_STATE
@pytest.mark.parametrize("way", SEVERAL)
def test_columns_of_several_evaluations(way: str, state: str) -> None:
    value = STATES[state]()
    # a private generator is drawn from under vmap, which torch itself sees
    with pytest.raises(NotImplementedError, match=f"{CHANGING}|it is random"):
        SEVERAL[way](lambda x: x.sin() * value(), point(4))


@EVERY_STATE
@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto", "forward"])
def test_one_evaluation_is_of_one_draw(strategy: str, state: str) -> None:
    value, x = STATES[state](), point(4)
    y, jac = jacfunc.value_and_jacobian(lambda x: x * value(), strategy=strategy)(x)
    factor = y[0] / x[0]
    torch.testing.assert_close(jac, factor * torch.eye(4, dtype=torch.float64))


@EVERY_STATE
def test_another_way_that_evaluates_once_goes_on(state: str) -> None:
    value, x = STATES[state](), point(4)
    plan = jacfunc.Plan(Forward(1), "made up", otherwise=(jacfunc.Reverse(),))
    jac = jacfunc.jacobian(lambda x: x * value(), strategy=plan)(x)
    assert len(jac.diagonal().unique()) == 1


@pytest.mark.parametrize("way", SEVERAL)
def test_the_same_numbers_are_not_refused(way: str) -> None:
    """nan and infinities are themselves."""
    apart = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])

    def func(x: Tensor) -> Tensor:
        return x.sin() + apart

    SEVERAL[way](func, point(4))


def test_the_same_masks_are_not_refused() -> None:
    def func(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    jac = jacfunc.jacobian(func, strategy=Forward(2))(point(40))
    assert set(jac.diagonal().tolist()) == {0.0, 2.0}


class Scaled(nn.Module):
    """A layer, times a number from outside."""

    def __init__(self, value: Callable[[], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.__dict__["value"] = value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).tanh() * self.value()
        return out


def ones(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in module.named_parameters()}


KEPT = pytest.mark.parametrize("state", ["generator", "counter", "alternating"])
"""What a module keeps is as it was at every evaluation of one result."""


def with_value(module: Scaled, value: float) -> Tensor:
    """``[B, M, P]`` at one number, by plain autograd."""
    layer, x = module.layer, point(5, 3)
    rows = [
        torch.autograd.grad(out, list(layer.parameters()), retain_graph=True)
        for out in (layer(x).tanh() * value).flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(5, 2, -1)


@KEPT
def test_what_a_module_keeps_is_of_one_draw(state: str) -> None:
    module = Scaled(STATES[state]())
    jac = with_value(module, STATES[state]()())
    for strategy in ("looped", Looped("columns"), "auto"):
        derive = jacfunc.module_jacobian(
            module, per_sample=True, strategy=strategy, flat=True, randomness="same"
        )
        torch.testing.assert_close(derive(point(5, 3)), jac)
    G = jacfunc.ggn(module, half_square)(point(5, 3), point(5, 2))
    actual = torch.cat([part.flatten() for part in (G @ ones(module)).values()])
    torch.testing.assert_close(actual, torch.einsum("bmp,bm->p", jac, jac.sum(2)))


@pytest.mark.parametrize("state", ["numpy", "python"])
def test_samples_one_by_one(state: str) -> None:
    module = Scaled(STATES[state]())
    for strategy in ("looped", Looped("columns")):
        derive = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
        with pytest.raises(NotImplementedError, match=f"^module_jacobian: .*{CHANGING}"):
            derive(point(5, 3))


@pytest.mark.parametrize("state", ["numpy", "python"])
def test_products_of_a_batch_are_of_one_draw(state: str) -> None:
    """Where two evaluations differ, the graph of one alone gives all products."""
    drawn, value = list[float](), STATES[state]()

    def recorded() -> float:
        drawn.append(value())
        return drawn[-1]

    module = Scaled(recorded)
    G = jacfunc.ggn(module, half_square)(point(5, 3), point(5, 2))
    products = [torch.cat([x.flatten() for x in (G @ ones(module)).values()]) for _ in range(3)]
    jac = with_value(module, 1.0)
    of_one = torch.einsum("bmp,bm->p", jac, jac.sum(2))
    factor = float(products[0][0] / of_one[0])
    assert any(abs(factor - number**2) < 1e-12 for number in drawn)
    for product in products:
        torch.testing.assert_close(product, factor * of_one)


@pytest.mark.parametrize("state", ["numpy", "python", "counter"])
def test_kernels_over_chunks(state: str) -> None:
    value = STATES[state]()

    def func(params: Tensor, x: Tensor) -> Tensor:
        return (params * x).tanh() * value()

    with pytest.raises(NotImplementedError, match=f"^ntk: .*{CHANGING}"):
        jacfunc.ntk(func, point(3), point(6, 3), chunk_size=2)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("strategy", ["looped", "auto", "reverse", "structured", "forward"])
def test_masks_of_torch_are_repeated(strategy: str, randomness: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double()
    memory = None if strategy in ("looped", "structured") else 4000
    derive = jacfunc.module_jacobian(
        module, per_sample=True, strategy=strategy, randomness=randomness, memory=memory
    )
    assert derive(point(5, 3))["0.weight"].shape == (5, 2, 4, 3)


# --- J v is the transpose of Jᵀ u ---


class Hooked(nn.Linear):
    """Triples what comes back by a hook, which takes a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            z = y.detach().requires_grad_()
            w = 3 * z
            y.register_hook(lambda g: torch.autograd.grad(w, z, g, retain_graph=True)[0])
        return y


class Detached(torch.autograd.Function):
    """A backward pass whose derivative in the cotangent is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g.detach()


class ByNumpy(torch.autograd.Function):
    """A backward pass outside of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(3 * g.detach().numpy())


class Through(nn.Linear):
    """One of the two outputs through a function of its own, the other as it is."""

    def __init__(self, function: Any) -> None:
        super().__init__(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([self.function.apply(y[:, :1]), y[:, 1:]], 1)


class Scaling(nn.Linear):
    """A hook that is differentiable: the graph of the pullback shows it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: 3 * g)
        return y


MODULES: dict[str, Callable[[], nn.Module]] = {
    "hook": lambda: Hooked(3, 2),
    "detached": lambda: Through(Detached),
    "numpy": lambda: Through(ByNumpy),
    "differentiable hook": lambda: Scaling(3, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_products_are_those_of_the_backward_pass(name: str) -> None:
    module, x = MODULES[name]().double(), point(4, 3)
    params, out = list(module.parameters()), module(x)
    rows = [torch.autograd.grad(o, params, retain_graph=True) for o in out.flatten()]
    jac = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = jac.T @ jac.sum(1)
    G = jacfunc.ggn(module, half_square)(x, point(4, 2))
    for _ in range(3):
        found = torch.cat([part.flatten() for part in (G @ ones(module)).values()])
        torch.testing.assert_close(found, expected)


class RandomCotangents(TorchDispatchMode):
    """Counts the random cotangents by which a product is compared with its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.randn.generator
        return func(*args, **(kwargs or {}))


def test_the_transpose_is_looked_at_now_and_then() -> None:
    """At the first, the second and the fourth point, and anew where the module has another part.

    The first point of all counts apart: its evaluation pushes tangents, which leaves another graph.
    """
    module, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), point(4, 3)
    ggn = jacfunc.ggn(module, half_square)
    counts = []
    for _ in range(5):
        targets = point(4, 2)
        with RandomCotangents() as cotangents:
            ggn(x, targets) @ ones(module)
        counts.append(cotangents.count)
    assert counts == [1, 1, 1, 0, 1]
    module[0].register_forward_hook(
        lambda m, given, out: out.register_hook(lambda g: 3 * g.detach()) and None
    )
    params = list(module.parameters())
    rows = [torch.autograd.grad(o, params, retain_graph=True) for o in module(x).flatten()]
    jac = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    found = ggn(x, point(4, 2)) @ ones(module)  # seen to be no transpose, and multiplied by rows
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in found.values()]), jac.T @ jac.sum(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_a_deep_network_are_not_refused(dtype: torch.dtype) -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()) for _ in range(12)]
    module = nn.Sequential(*layers).to(dtype)
    G = jacfunc.ggn(module, half_square)(point(6, 8).to(dtype), point(6, 8).to(dtype))
    for _ in range(2):
        assert all(part.isfinite().all() for part in (G @ ones(module)).values())


DISTURBED: list[int] = []


class Disturbed(nn.Linear):
    """While it is evaluated, another thread draws, as often as the list is long."""

    def forward(self, x):
        if DISTURBED:
            DISTURBED.pop()
            other = Thread(target=torch.rand, args=(1,))
            other.start()
            other.join()
        return super().forward(x).tanh()


@pytest.mark.parametrize("call", [0, 5])
@pytest.mark.parametrize("times", [1, 3])
def test_what_another_thread_draws_is_not_the_modules(call, times):
    torch.manual_seed(0)
    module = Disturbed(3, 2).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    vector = {name: torch.ones_like(param) for name, param in module.named_parameters()}
    ones = torch.cat([v.reshape(-1) for v in vector.values()])
    J = jacfunc.module_jacobian(module, per_sample=True, flat=True, strategy="looped")(x)
    expected = J @ ones, 2 * torch.einsum("bcp,bcq,q->p", J, J, ones)
    made = jacfunc.module_operator(module, per_sample=True)
    curvature = jacfunc.ggn(module, nn.MSELoss(reduction="sum"))
    for number in range(call + 2):
        disturbed = [1] * times if number == call else []
        DISTURBED[:] = disturbed
        products = [made(x) @ vector]
        DISTURBED[:] = disturbed
        products += [torch.cat([v.reshape(-1) for v in (curvature(x, y) @ vector).values()])]
        torch.testing.assert_close(products, [*expected])
