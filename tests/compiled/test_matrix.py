"""Every door compiled, on functions and modules of many kinds: right at other numbers, or listed.

Oracles are rows of plain autograd in float64. What is listed is refused in torch's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


A, CUBE = drawn(4, 4, seed=1), drawn(3, 4, 4, seed=2)
INDEX = torch.tensor([2, 0, 0, 1])


def joints(q: Tensor) -> Tensor:
    """A chain of joints in the plane: where each ends."""
    angles = q.cumsum(0)
    return torch.stack([angles.cos(), angles.sin()], 1).cumsum(0)


def bodies(x: Tensor) -> Tensor:
    """Accelerations of two bodies in the plane."""
    apart = x[:2] - x[2:]
    force = apart / (apart.square().sum() + 0.1) ** 1.5
    return torch.cat([-force, force])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: x.sin() * x.exp(),
    "matrix": lambda x: torch.tanh(A @ x),
    "einsum": lambda x: torch.einsum("ijk,j,k->i", CUBE, x, x),
    "softmax": lambda x: F.log_softmax(x, 0)[:3],
    "normalized": lambda x: F.layer_norm(x, (4,)) * x.norm(),
    "indexed": lambda x: x[INDEX] * x.flip(0) + x.index_add(0, INDEX, x * 2),
    "sorted": lambda x: x.sort().values.cumprod(0),
    "solved": lambda x: torch.linalg.solve(A + torch.diag(x) + 9 * torch.eye(4, dtype=DOUBLE), x),
    "where": lambda x: torch.where(x > 0, x.square(), x.exp()),
    "joints": joints,
    "bodies": bodies,
    "loop": lambda x: [x := (A @ x).sin() for _ in range(3)][-1],
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.unflatten(-1, (3, 4))).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.out((weights @ v).mean(-2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(12, 12), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(torch.tanh(self.layer(x))) * self.scale)[..., :2]


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(-1, (1, 3, 4)),
        *(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(-3), nn.Linear(12, 2)),
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)),
    "convolution": convolution,
    "normalized": lambda: nn.Sequential(
        nn.Linear(12, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)
    ),
    "attention": Attention,
    "tied": Tied,
    "statistics": lambda: nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2)).eval(),
}


def rows(func: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Blocks ``[*out, *in]``, a row after the other."""
    inputs = tuple([x.detach().clone().requires_grad_() for x in inputs])
    out = func(*inputs)
    every = [
        torch.autograd.grad(each, inputs, retain_graph=True, materialize_grads=True)
        for each in out.flatten()
    ]
    pairs = zip(zip(*every, strict=True), inputs, strict=True)
    return [torch.stack(column).view(*out.shape, *x.shape) for column, x in pairs]


def second(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Hessian of the sum of outputs, a row after the other."""

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(func(x).sum(), x, create_graph=True)[0] + 0 * x.sum()

    return rows(gradient, x)[0]


def summed(func: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: func(x).sum()


def batch_of(x: Tensor) -> Tensor:
    return torch.stack([x, 0.5 * x, x + 0.3])


FUNCTION_DOORS: dict[str, tuple[Any, Any]] = {
    "jacrev": (jacfunc.jacrev, lambda f, x: rows(f, x)[0]),
    "jacfwd": (jacfunc.jacfwd, lambda f, x: rows(f, x)[0]),
    "auto": (jacfunc.jacobian, lambda f, x: rows(f, x)[0]),
    "looped": (lambda f: jacfunc.jacobian(f, strategy="looped"), lambda f, x: rows(f, x)[0]),
    "value": (
        lambda f: lambda x: jacfunc.value_and_jacobian(f)(x)[1],
        lambda f, x: rows(f, x)[0],
    ),
    "hessian": (lambda f: jacfunc.hessian(summed(f)), second),
    "hessian forward": (lambda f: jacfunc.hessian(summed(f), strategy="forward"), second),
    "hvp": (
        lambda f: lambda x: jacfunc.hvp(summed(f), (x,), (x,))[1][0],
        lambda f, x: second(f, x) @ x,
    ),
    "laplacian": (lambda f: jacfunc.laplacian(summed(f)), lambda f, x: second(f, x).trace()),
    "vmap jacrev": (
        lambda f: lambda x: jacfunc.vmap(jacfunc.jacrev(f))(batch_of(x)),
        lambda f, x: torch.stack([rows(f, each)[0] for each in batch_of(x)]),
    ),
    "vmap jacfwd": (
        lambda f: lambda x: jacfunc.vmap(jacfunc.jacfwd(f))(batch_of(x)),
        lambda f, x: torch.stack([rows(f, each)[0] for each in batch_of(x)]),
    ),
    "vjp": (
        lambda f: lambda x: jacfunc.vjp(f, x)[1](f(x).cos())[0],
        lambda f, x: torch.tensordot(f(x).cos(), rows(f, x)[0], f(x).dim()),
    ),
    "jvp": (
        lambda f: lambda x: jacfunc.jvp(f, (x,), (x,))[1],
        lambda f, x: rows(f, x)[0] @ x,
    ),
}


@pytest.mark.parametrize("door", FUNCTION_DOORS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(door: str, name: str) -> None:
    (derive, oracle), func = FUNCTION_DOORS[door], FUNCTIONS[name]
    compiled = jacfunc.compile(derive(func), backend="replay")
    x = drawn(4)
    for point in (x, 0.5 - x, 2 * x):
        torch.testing.assert_close(compiled(point), oracle(func, point))
    assert len(compiled.compilations) == 1


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


Y = drawn(3, 2, seed=5)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def called_with(model: nn.Module, x: Tensor) -> Callable[..., Tensor]:
    names = [name for name, _ in model.named_parameters()]

    def call(*params: Tensor) -> Tensor:
        named = dict(zip(names, params, strict=True))
        return torch.func.functional_call(model, named, (x,))

    return call


def whole(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    params = params_of(model)
    return dict(zip(params, rows(called_with(model, x), *params.values()), strict=True))


def each(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    every = [whole(model, sample[None]) for sample in x]
    return {name: torch.stack([one[name][0] for one in every]) for name in every[0]}


def flat(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([block.flatten(2) for block in each(model, x).values()], 2)


def norms(model: nn.Module, x: Tensor) -> Tensor:
    losses = flat(model, x) * (model(x) - Y)[..., None]
    return losses.sum(1).norm(dim=1).detach()


def times_ones(model: nn.Module, x: Tensor) -> Tensor:
    jac = flat(model, x).flatten(0, 1)
    return jac.T @ (jac @ torch.ones(jac.shape[1], dtype=DOUBLE))


def ones_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in params_of(model).items()}


def in_a_row(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tree.values()])


per_sample = {"per_sample": True}
MODULE_DOORS: dict[str, tuple[Any, Any]] = {
    "params": (jacfunc.module_jacobian, whole),
    "per sample": (lambda m: jacfunc.module_jacobian(m, per_sample=True), each),
    "flat": (lambda m: jacfunc.module_jacobian(m, per_sample=True, flat=True), flat),
    "inputs": (
        lambda m: jacfunc.module_jacobian(m, "inputs"),
        lambda m, x: rows(m, x)[0],
    ),
    "inputs per sample": (
        lambda m: jacfunc.module_jacobian(m, "inputs", per_sample=True),
        lambda m, x: torch.stack([rows(m, one[None])[0][0, :, 0] for one in x]),
    ),
    "ntk": (
        lambda m: lambda x: jacfunc.ntk(m, None, x),
        lambda m, x: torch.einsum("bip,cjp->bcij", flat(m, x), flat(m, x)),
    ),
    "ggn product": (
        lambda m: lambda x: in_a_row(jacfunc.ggn(m, squared)(x, Y) @ ones_of(m)),
        times_ones,
    ),
    "ggn diagonal": (
        lambda m: lambda x: in_a_row(jacfunc.ggn(m, nn.MSELoss(reduction="sum"))(x, Y).diagonal()),
        lambda m, x: 2 * flat(m, x).square().sum((0, 1)),
    ),
    "norms": (lambda m: lambda x: jacfunc.gradient_norms(m, squared)(x, Y), norms),
}


def test_a_loss_of_ones_own_is_listed() -> None:
    """Its second derivative is seen to be positive by its numbers."""
    model = MODULES["perceptron"]().to(DOUBLE)
    diagonal = jacfunc.compile(lambda x: jacfunc.ggn(model, squared)(x, Y).diagonal())
    with pytest.raises(NotImplementedError, match="value out of a tracing tensor"):
        diagonal(drawn(3, 12))


@pytest.mark.parametrize("door", MODULE_DOORS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(door: str, name: str) -> None:
    (derive, oracle), model = MODULE_DOORS[door], MODULES[name]().to(DOUBLE)
    compiled = jacfunc.compile(derive(model), backend="replay")
    x = drawn(3, 12, seed=3)
    for factor in (1.0, 0.7):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(factor)
            for point in (x, 0.5 - x):
                answer = compiled(point)
                with torch.enable_grad():
                    expected = oracle(model, point)
                torch.testing.assert_close(answer, expected, check_stride=False)
    assert len(compiled.compilations) == 1
