"""Rules run below the vmap around: right for whatever meets the samples, and in few calls."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc
from tests.house.calls import is_call, num_calls
from tests.truth.oracles import looped_hessian

Func = Callable[[Tensor, Tensor], Tensor]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


W, V, C, MANY = drawn(4, 3), drawn(3), drawn(4), drawn(2, 4)
SQUARE, CUBE = drawn(4, 4), drawn(2, 3, 4)
FUNCS: dict[str, Func] = {
    "layers": lambda x, w: F.linear(torch.tanh(F.linear(x, W, C)), W.T).sigmoid(),
    "a weight a sample": lambda x, w: F.linear(torch.tanh(F.linear(x, W * w[0])), W.T, w),
    "a bias by name": lambda x, w: torch.sin(F.linear(x, W, bias=C)) + F.linear(x, W, bias=None),
    "products from both sides": lambda x, w: torch.tanh(W @ x) + torch.tanh(x @ W.T) @ SQUARE,
    "products with vectors": lambda x, w: torch.exp(x @ V) + torch.tanh(x) @ w + V @ x.sin(),
    "products of two": lambda x, w: x.sin() @ x + torch.outer(x, x.cos()) @ x.exp(),
    "products with more dimensions": lambda x, w: x.sin() @ CUBE,
    "numbers meet vectors": lambda x, w: x.sin().sum() * C + C / x.exp().sum() - x[0].tanh() * w[1],
    "vectors meet matrices": lambda x, w: torch.tanh(W @ x) * MANY + MANY / (W @ x).exp(),
    "jets of other dimensions": lambda x, w: torch.outer(x, x.sin()) * x.cos() + x[0].exp() * x,
    "a constant of each sample": lambda x, w: x.sin() * w + w / x.exp() - torch.clamp(x, w - 1, w),
    "by name": lambda x, w: torch.add(x.sin(), other=x.cos(), alpha=2) * torch.mul(x, other=V),
    "used again": lambda x, w: x + torch.tanh(x) * x - torch.sigmoid(x) ** 2 + 2**x,
    "settings": lambda x, w: F.silu(x) + F.gelu(x, approximate="tanh") + F.softplus(x, beta=2.0),
    "views between": lambda x, w: torch.tanh(torch.tanh(x.view(3, 1) * V).T.flatten() + 1).sum(),
    "a transform inside": lambda x, w: x.sin() * torch.func.grad(lambda c: (c**3).sum())(w),
    "a map of constants inside": lambda x, w: x.sin() * torch.vmap(torch.tanh)(w) * torch.tanh(x),
}
POINTS, WEIGHTS = drawn(5, 3, seed=2), drawn(5, 3, seed=3)


def diagonal_at(func: Func, x: Tensor, w: Tensor) -> Tensor:
    return looped_hessian(lambda x: func(x, w), (x,)).diagonal(dim1=-2, dim2=-1)


@pytest.mark.parametrize("name", FUNCS)
def test_batches_are_right(name: str) -> None:
    func = FUNCS[name]
    expected = torch.stack([diagonal_at(func, x, w) for x, w in zip(POINTS, WEIGHTS, strict=True)])
    laplacian = jacfunc.vmap(jacfunc.laplacian(func))
    torch.testing.assert_close(laplacian(POINTS, WEIGHTS), expected.sum(-1))
    diagonal = jacfunc.vmap(jacfunc.hessian_diagonal(func))
    torch.testing.assert_close(diagonal(POINTS, WEIGHTS), expected)
    parts = jacfunc.vmap(jacfunc.value_jacobian_laplacian(func), in_dims=(1, 0))
    value, jacobian, second = parts(POINTS.T.contiguous(), WEIGHTS)
    torch.testing.assert_close(value, torch.vmap(func)(POINTS, WEIGHTS))
    torch.testing.assert_close(jacobian, torch.vmap(torch.func.jacrev(func))(POINTS, WEIGHTS))
    torch.testing.assert_close(second, expected.sum(-1))


@pytest.mark.parametrize("name", FUNCS)
def test_points_and_weights_of_their_own_are_right(name: str) -> None:
    """A vmap in a vmap; and points that all samples share."""
    func, laplacian = FUNCS[name], jacfunc.laplacian(FUNCS[name])
    pairs = [[diagonal_at(func, x, w).sum(-1) for w in WEIGHTS[:2]] for x in POINTS[:3]]
    expected = torch.stack([*map(torch.stack, pairs)])
    by_weight = jacfunc.vmap(laplacian, in_dims=(None, 0))
    torch.testing.assert_close(by_weight(POINTS[0], WEIGHTS[:2]), expected[0])
    both = jacfunc.vmap(by_weight, in_dims=(0, None))(POINTS[:3], WEIGHTS[:2])
    torch.testing.assert_close(both, expected)
    one = jacfunc.vmap(laplacian)(POINTS[:1], WEIGHTS[:1])
    torch.testing.assert_close(one, expected[:1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [drawn(), drawn(3), drawn(1).float(), torch.tensor(2)])
def test_dtypes_are_those_of_one_sample(dtype: torch.dtype, constant: Tensor) -> None:
    def func(x: Tensor) -> Tensor:
        return x.square().sum() * constant

    points = POINTS.to(dtype)
    batch = jacfunc.vmap(jacfunc.laplacian(func))(points)
    singles = torch.stack([jacfunc.laplacian(func)(x) for x in points])
    assert batch.dtype == singles.dtype == func(points[0]).dtype
    torch.testing.assert_close(batch, singles)


def net(*widths: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def test_weights_are_trained_through_batches() -> None:
    """Gradients through Laplacians equal those through traces of torch's Hessians."""
    model = net(3, 8, 8, 1)
    ours = jacfunc.vmap(jacfunc.laplacian(lambda x: model(x)[0]))(POINTS)
    trace = torch.vmap(lambda x: torch.func.hessian(lambda x: model(x)[0])(x).trace())(POINTS)
    weights = [p for name, p in model.named_parameters() if name != "4.bias"]
    expected = torch.autograd.grad(trace.square().sum(), weights)
    for grad, other in zip(
        torch.autograd.grad(ours.square().sum(), weights), expected, strict=True
    ):
        torch.testing.assert_close(grad, other)


def test_a_batch_takes_few_calls() -> None:
    """Counted: functions of Python and C of a network of three layers, once its kind is known."""
    laplacian = jacfunc.vmap(jacfunc.laplacian(net(3, 8, 8, 8, 1).requires_grad_(False)))
    gc.disable()
    try:
        for _ in range(4):
            laplacian(POINTS)
        assert num_calls(lambda: laplacian(POINTS), is_call) <= 750
    finally:
        gc.enable()
