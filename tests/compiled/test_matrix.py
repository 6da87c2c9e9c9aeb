"""Every door and strategy compiled, on functions and modules: right at other numbers, or listed.

Oracles are rows of plain autograd in float64. What is listed is refused in torch's own words. Some
pairs are always tried, of the others a part; ``JACFUNC_EVERY_KIND=1`` tries all, which takes ten
minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.unflatten(-1, (3, 4)))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unflatten(-1, (3, 4))).mean(-2)[..., :2]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(12, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 12) / 12)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("oij,...i,...j->...o", self.weight, x, x)
        return out.mul_(self.scale).tanh_()


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 4), nn.SiLU(), nn.Dropout(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model.eval()


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
    "recurrent": Recurrent,
    "encoder": Encoder,
    "checkpointed": Checkpointed,
    "reparametrized": lambda: nn.Sequential(weight_norm(nn.Linear(12, 3)), nn.Linear(3, 2)),
    "frozen": frozen,
    "bilinear": Bilinear,
}
FIRST_MODULES = [*MODULES][:6]


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


def jacobian_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return rows(f, x)[0]


def entry_by_entry(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Hessians of all outputs ``[*out, n, n]``."""
    out = f(x)
    every = [second(lambda x, k=k: f(x).flatten()[k], x) for k in range(out.numel())]  # type: ignore[misc]
    return torch.stack(every).unflatten(0, out.shape)


FIRST_FUNCTION_DOORS = [*FUNCTION_DOORS]
for name in ("reverse", "forward", "looped", "structured", "autotune"):
    FUNCTION_DOORS |= {
        f"jacobian {name}": (partial(jacfunc.jacobian, strategy=name), jacobian_of),
        f"hessian {name}": (
            lambda f, name=name: jacfunc.hessian(summed(f), strategy=name),
            second,
        ),
    }
FUNCTION_DOORS |= {
    "hessian over forward": (
        lambda f: jacfunc.hessian(summed(f), strategy="reverse-over-forward"),
        second,
    ),
    "reverse in chunks": (
        lambda f: jacfunc.jacobian(f, strategy="reverse", chunk_size=2),
        jacobian_of,
    ),
    "forward in chunks": (
        lambda f: jacfunc.jacobian(f, strategy="forward", chunk_size=3),
        jacobian_of,
    ),
    "jacfwd in chunks": (lambda f: jacfunc.jacfwd(f, chunk_size=2), jacobian_of),
    "jacrev in chunks": (lambda f: jacfunc.jacrev(f, chunk_size=2), jacobian_of),
    "budget": (lambda f: jacfunc.jacobian(f, memory="64 MB"), jacobian_of),
    "vmap auto": (
        lambda f: lambda x: jacfunc.vmap(jacfunc.jacobian(f))(batch_of(x)),
        lambda f, x: torch.stack([rows(f, each)[0] for each in batch_of(x)]),
    ),
    "vmap hessian": (
        lambda f: lambda x: jacfunc.vmap(jacfunc.hessian(summed(f)))(batch_of(x)),
        lambda f, x: torch.stack([second(f, each) for each in batch_of(x)]),
    ),
    "vmap of torch": (
        lambda f: lambda x: torch.vmap(jacfunc.jacrev(f))(batch_of(x)),
        lambda f, x: torch.stack([rows(f, each)[0] for each in batch_of(x)]),
    ),
    "jacrev of jacfwd": (lambda f: jacfunc.jacrev(jacfunc.jacfwd(f)), entry_by_entry),
    "jacfwd of jacrev": (lambda f: jacfunc.jacfwd(jacfunc.jacrev(f)), entry_by_entry),
    "all hessians": (jacfunc.hessian, entry_by_entry),
    "linearized": (
        lambda f: lambda x: jacfunc.linearize(f, x)[1] @ x,
        lambda f, x: rows(f, x)[0] @ x,
    ),
    "linearized, transposed": (
        lambda f: lambda x: jacfunc.linearize(f, x)[1].T @ f(x).cos(),
        lambda f, x: torch.tensordot(f(x).cos(), rows(f, x)[0], f(x).dim()),
    ),
    "hessian operator": (
        lambda f: lambda x: jacfunc.hessian_operator(summed(f), x)[1] @ x,
        lambda f, x: second(f, x) @ x,
    ),
    "linearized, by methods": (
        lambda f: lambda x: jacfunc.linearize(f, x)[1].mv(x),
        lambda f, x: rows(f, x)[0] @ x,
    ),
    "hessian operator, by methods": (
        lambda f: lambda x: jacfunc.hessian_operator(summed(f), x)[1].mv(x),
        lambda f, x: second(f, x) @ x,
    ),
    "diagonal": (
        lambda f: jacfunc.hessian_diagonal(summed(f)),
        lambda f, x: second(f, x).diagonal(),
    ),
    "value, jacobian, laplacian": (
        lambda f: jacfunc.value_jacobian_laplacian(f),
        lambda f, x: (
            f(x),
            rows(f, x)[0],
            entry_by_entry(f, x).diagonal(dim1=-2, dim2=-1).sum(-1),
        ),
    ),
    "divergence": (
        lambda f: jacfunc.divergence(lambda x: f(x).sum() * x),
        lambda f, x: rows(lambda x: f(x).sum() * x, x)[0].trace(),
    ),
    "gram": (
        jacfunc.gram,
        lambda f, x: torch.tensordot(rows(f, x)[0], rows(f, x)[0], ([-1], [-1])),
    ),
    "graph": (
        lambda f: lambda x: jacfunc.graph_jacobian(f(y := x.clone().requires_grad_()), y),
        jacobian_of,
    ),
    "plan": (lambda f: jacfunc.jacobian(f, strategy=jacfunc.plan(f, drawn(4))), jacobian_of),
}
EVERY = os.environ.get("JACFUNC_EVERY_KIND") == "1"
PART = 6


def cells(
    doors: Any, names: Any, first_doors: Any, first_names: Any, part: int = PART
) -> list[tuple[str, str]]:
    """Pairs that are tried: all of the first ones, of others a part, each door with another."""
    return [
        (door, name)
        for n, door in enumerate(doors)
        for k, name in enumerate(names)
        if EVERY or (door in first_doors and name in first_names) or (n + k) % part == 0
    ]


WRONG_FORWARD = "forward mode of linalg_solve is wrong here"
FUNCTIONS_LISTED: dict[tuple[str, str], str] = {
    ("hessian over forward", "solved"): WRONG_FORWARD,
    ("jacrev of jacfwd", "solved"): WRONG_FORWARD,
}
FUNCTION_DOORS_LISTED: dict[str, str] = {}


@pytest.mark.parametrize(
    ("door", "name"), cells(FUNCTION_DOORS, FUNCTIONS, FIRST_FUNCTION_DOORS, FUNCTIONS)
)
def test_functions(door: str, name: str) -> None:
    (derive, oracle), func = FUNCTION_DOORS[door], FUNCTIONS[name]
    compiled = jacfunc.compile(derive(func), backend="replay")
    x = drawn(4)
    if words := FUNCTIONS_LISTED.get((door, name)) or FUNCTION_DOORS_LISTED.get(door):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
            compiled(x)
        return
    for point in (x, 0.5 - x, 2 * x):
        torch.testing.assert_close(compiled(point), oracle(func, point))
    assert len(compiled.compilations) == 1


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


Y = drawn(3, 2, seed=5)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Blocks of the parameters, a row after the other."""
    params, out = params_of(model), model(x)
    every = [
        torch.autograd.grad(y, [*params.values()], retain_graph=True, materialize_grads=True)
        for y in out.flatten()
    ]
    blocks = [torch.stack(column) for column in zip(*every, strict=True)]
    return {name: b.unflatten(0, out.shape) for name, b in zip(params, blocks, strict=True)}


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


def both(m: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    return whole(m, x), rows(m, x)[0]


def both_of_samples(m: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    return each(m, x), torch.stack([rows(m, one[None])[0][0, :, 0] for one in x])


ORACLES: dict[tuple[Any, bool], Any] = {
    ("params", False): whole,
    ("params", True): each,
    ("inputs", False): lambda m, x: both(m, x)[1],
    ("inputs", True): lambda m, x: both_of_samples(m, x)[1],
    (("params", "inputs"), False): both,
    (("params", "inputs"), True): both_of_samples,
}
STRATEGIES = "reverse", "looped", "forward", "structured"
FIRST_DOORS = [*MODULE_DOORS]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def kernel(m: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("bip,cjp->bcij", flat(m, x), flat(m, x))


def products(m: nn.Module, x: Tensor) -> Tensor:
    return flat(m, x) @ torch.ones(flat(m, x).shape[2], dtype=DOUBLE)


def of_loss(m: nn.Module, x: Tensor) -> Tensor:
    """The Hessian of a loss in the parameters, on ones: differences of its gradient."""
    params, step = [*params_of(m).values()], 1e-6

    def gradient(shift: float) -> Tensor:
        with torch.no_grad():
            for param in params:
                param.add_(shift)
        pulled = torch.autograd.grad(loss_of(m(x), Y), params)
        with torch.no_grad():
            for param in params:
                param.sub_(shift)
        return torch.cat([each.flatten() for each in pulled])

    return (gradient(step) - gradient(-step)) / (2 * step)


for (wrt, is_per_sample), oracle in ORACLES.items():
    for strategy in ("auto", *STRATEGIES):
        mode = "per sample" if is_per_sample else "whole"
        name = f"{wrt if isinstance(wrt, str) else 'both'} {mode} {strategy}"
        make = partial(
            jacfunc.module_jacobian, wrt=wrt, per_sample=is_per_sample, strategy=strategy
        )
        MODULE_DOORS[name] = (make, oracle)
MODULE_DOORS |= {
    "ntk trace": (
        lambda m: lambda x: jacfunc.ntk(m, None, x, trace_axes=(-1,)),
        lambda m, x: kernel(m, x).diagonal(dim1=2, dim2=3).sum(-1),
    ),
    "ntk of two": (
        lambda m: lambda x: jacfunc.ntk(m, None, x, x[:2] * 0.5),
        lambda m, x: torch.einsum("bip,cjp->bcij", flat(m, x), flat(m, x[:2] * 0.5)),
    ),
    "gram": (
        lambda m: jacfunc.gram(m),
        lambda m, x: torch.tensordot(rows(m, x)[0], rows(m, x)[0], ([2, 3], [2, 3])),
    ),
    "ggn dense": (
        lambda m: lambda x: jacfunc.ggn(m, nn.MSELoss(reduction="sum"))(x, Y).matrix(),
        lambda m, x: 2 * flat(m, x).flatten(0, 1).T @ flat(m, x).flatten(0, 1),
    ),
    "ggn of classes": (
        lambda m: (
            lambda x: in_a_row(
                jacfunc.ggn(m, nn.CrossEntropyLoss(reduction="sum"))(x, CLASSES).diagonal()
            )
        ),
        lambda m, x: torch.einsum("bip,bij,bjp->p", flat(m, x), of_classes(m(x)), flat(m, x)),
    ),
    "fisher": (
        lambda m: lambda x: in_a_row(jacfunc.fisher(m, "gaussian")(x).diagonal()),
        lambda m, x: torch.zeros(0),
    ),
    "operator": (
        lambda m: lambda x: jacfunc.module_operator(m)(x) @ ones_of(m),
        products,
    ),
    "operator transposed": (
        lambda m: lambda x: in_a_row(jacfunc.module_operator(m)(x).T @ m(x).cos()),
        lambda m, x: torch.einsum("bip,bi->p", flat(m, x), m(x).cos()),
    ),
    "hessian of a module": (
        lambda m: lambda x: in_a_row(jacfunc.module_hessian(m, loss_of)(x, Y) @ ones_of(m)),
        of_loss,
    ),
    "chosen outputs": (
        lambda m: jacfunc.module_jacobian(m, per_sample=True, flat=True, outputs=[1]),
        lambda m, x: flat(m, x)[:, 1:],
    ),
    "budget": (
        lambda m: jacfunc.module_jacobian(m, per_sample=True, flat=True, memory="64 MB"),
        flat,
    ),
    "value": (
        lambda m: (
            lambda x: jacfunc.module_jacobian(m, per_sample=True, flat=True)(x) * m(x)[..., None]
        ),
        lambda m, x: flat(m, x) * m(x)[..., None],
    ),
    "stream": (
        lambda m: lambda x: dict(jacfunc.stream_jacobian(m, "params", per_sample=True)(x)),
        each,
    ),
    "projection": (
        lambda m: lambda x: jacfunc.random_projection(m, 5)(x),
        lambda m, x: jacfunc.random_projection(m, 5)(x),  # which tests/curvature judges
    ),
}
CLASSES = torch.tensor([0, 1, 1])


def of_classes(outputs: Tensor) -> Tensor:
    p = outputs.softmax(-1)
    return torch.diag_embed(p) - p[..., None] * p[..., None, :]


DOORS_LISTED = {
    "fisher": "draw no random numbers",
}
MODULES_LISTED: dict[tuple[str, str], str] = {}


def test_a_loss_of_ones_own_is_listed() -> None:
    """Its second derivative is seen to be positive by its numbers."""
    model = MODULES["perceptron"]().to(DOUBLE)
    diagonal = jacfunc.compile(lambda x: jacfunc.ggn(model, squared)(x, Y).diagonal())
    with pytest.raises(NotImplementedError, match="value out of a tracing tensor"):
        diagonal(drawn(3, 12))


MODULE_CELLS = cells(MODULE_DOORS, MODULES, FIRST_DOORS, FIRST_MODULES, 2 * PART)


@pytest.mark.parametrize(("door", "name"), MODULE_CELLS)
def test_modules(door: str, name: str) -> None:
    (derive, oracle), model = MODULE_DOORS[door], MODULES[name]().to(DOUBLE)
    compiled = jacfunc.compile(derive(model), backend="replay")
    x = drawn(3, 12, seed=3)
    if words := MODULES_LISTED.get((door, name)) or DOORS_LISTED.get(door):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
            compiled(x)
        return
    rtol = 1e-5 if oracle is of_loss else 1e-7
    for factor in (1.0, 0.7):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(factor)
            for point in (x, 0.5 - x):
                answer = compiled(point)
                with torch.enable_grad():
                    expected = oracle(model, point)
                torch.testing.assert_close(
                    answer, expected, check_stride=False, rtol=rtol, atol=rtol
                )
    assert len(compiled.compilations) == 1
