"""Each rule gives the second derivatives of a loop of ``autograd.grad``, and no sweep runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc
from tests.truth.oracles import looped_hessian

Log = pytest.LogCaptureFixture
Func = Callable[[Tensor], Any]


def matrix(x: Tensor) -> Tensor:
    """A matrix that has an inverse, of which every entry depends on x."""
    return torch.outer(x[:3], x[3:].sin()) + torch.diag(x[:3].cosh() + 1)


def positive(func: Func, x: Tensor) -> Any:
    return func(x.square() + 0.3)


def small(func: Func, x: Tensor) -> Any:
    return func(x / 5)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


W, B, C = drawn(4, 6), drawn(4), drawn(6)
SHAPES = ((2,), (2, 2, 3), (2, 3, 2), (2, 3, 3), (2, 6), (3,), (3, 2), (3, 2, 2), (3, 3))
DRAWN = {shape if len(shape) > 1 else shape[0]: drawn(*shape) for shape in SHAPES}
ELEMENTWISE: dict[str, Func] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("tanh", "sigmoid", "exp", "exp2", "expm1", "sin", "cos", "sinh", "cosh", "atan"),
            *("asinh", "square", "abs", "neg", "erf", "erfc", "lgamma", "digamma", "reciprocal"),
        )
    },
    **{
        f"{name} of positive numbers": partial(positive, getattr(torch, name))
        for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "tan")
    },
    **{
        f"{name} of small numbers": partial(small, getattr(torch, name))
        for name in ("asin", "acos", "atanh", "erfinv")
    },
    "acosh": lambda x: torch.acosh(x.square() + 1.5),
    **{
        name: getattr(F, name)
        for name in (
            *("silu", "gelu", "softplus", "logsigmoid", "mish", "elu", "celu", "selu", "relu"),
            *("relu6", "leaky_relu", "hardtanh", "softsign"),
        )
    },
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus, sharp": lambda x: F.softplus(x, beta=4.0, threshold=3.0),
    "elu, 0.5": lambda x: F.elu(x, 0.5),
    "celu, 0.5": lambda x: F.celu(x, 0.5),
    "leaky_relu, 0.3": lambda x: F.leaky_relu(x, 0.3),
    "clamp": lambda x: x.clamp(-0.4, 0.9) * x,
    "clamp from below": lambda x: x.clamp(min=0.1) ** 2,
    "powers": lambda x: x**3 + x**2 + x**1 + x**0,
    "fractional power": lambda x: (x * x + 1) ** 1.5,
    "power of tensors": lambda x: (x * x + 1) ** C,
    "power of zero": lambda x: (x - x.detach()) ** torch.tensor([0.0, 1, 2, 3, 2, 1]).double(),
    "power of a number": lambda x: 2.0**x,
    "power of a constant": lambda x: C.abs() ** x,
}
ARITHMETIC: dict[str, Func] = {
    "sums": lambda x: 1 + x - 2 + (3 - x.sin()) + torch.add(x, x * x, alpha=2) - C,
    "sum of other shapes": lambda x: x[:2].sin() + x[2:].reshape(2, 2).cos(),
    "difference of other shapes": lambda x: torch.sub(B.view(4, 1), x * x, alpha=0.5),
    "products": lambda x: x * x.sin() * 2 * C,
    "product of other shapes": lambda x: x.sin() * x[:3].view(3, 1).cos(),
    "quotients": lambda x: x / (x * x + 1) + 1 / (x * x + 2) + x / 3,
    "quotient of other shapes": lambda x: x.sin() / (x[:3].view(3, 1) ** 2 + 1),
    "where": lambda x: torch.where(x > 0, x.sin(), x**3),
    "where, a constant": lambda x: torch.where(x > 0, 2.0, x**3) + x.where(x < 0, C),
    "atan2": lambda x: torch.atan2(x.sin(), x.cosh()) + torch.atan2(x, C),
    "hypot": lambda x: torch.hypot(x, x.cos()),
    "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
    "products of many": lambda x: x.prod() * x.view(2, 3).prod(0) + x.view(2, 3).prod(1, True)[0],
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x, value=2),
    "remainder": lambda x: (x % 0.4).square() + torch.fmod(x, 0.3) * x + x.frac() ** 2,
    "maximum": lambda x: torch.maximum(x.sin(), x.cos()) + torch.minimum(x * x, C),
    "lerp": lambda x: torch.lerp(x, x * x, x.sin()),
}
LINEAR: dict[str, Func] = {
    "linear": lambda x: F.linear(x.sin(), W, B),
    "linear, weights of inputs": lambda x: F.linear(C, torch.outer(B, x) * x, x[:4]),
    "matmul by a matrix": lambda x: W @ x.sin() + x.sin() @ W.T,
    "matmul of vectors": lambda x: x @ x.sin() + C @ x**2 + x**2 @ C,
    "matmul of both": lambda x: matrix(x) @ matrix(x).mT @ x[:3].sin(),
    "matmul of batches": lambda x: torch.stack([matrix(x), matrix(x).T]) @ DRAWN[2, 3, 2],
    "matmul by a batch": lambda x: DRAWN[2, 2, 3] @ matrix(x),
    "einsum": lambda x: torch.einsum("i,j,ij->j", x, x.sin(), torch.outer(x, x)),
    "outer, dot, mv, mm": lambda x: torch.mm(matrix(x), matrix(x)).mv(x[:3]).dot(x[3:]),
    "bilinear": lambda x: F.bilinear(x[:3], x[3:].sin(), DRAWN[2, 3, 3], DRAWN[2]),
    "convolution": lambda x: F.conv1d(x.sin().view(1, 2, 3), DRAWN[3, 2, 2], DRAWN[3], padding=1),
    "cross": lambda x: torch.linalg.cross(x[:3], x[3:].sin()),
    "cat and stack": lambda x: torch.cat([x * x, C, torch.stack([x[0] ** 3, x[1]])]),
    "views": lambda x: (
        x.view(2, 3).T.reshape(-1).unflatten(0, (3, 2)).permute(1, 0)[..., None] ** 2
    ),
    "indexing": lambda x: x[[0, 2, 2]].exp() + x[1:4] ** 2 + x[torch.arange(6) > 2].sin(),
    "split and unpack": lambda x: sum(a * b for a, b in zip(*x.split(3), strict=True)),
    "expand": lambda x: x.square().unsqueeze(0).expand(2, 6) * x.expand_as(DRAWN[2, 6]),
    "gather": lambda x: x.sin().gather(0, torch.tensor([3, 3, 1])) ** 2,
    "diagonals": lambda x: torch.diag_embed(x).tril() @ x.sin(),
    "cumsum and flip": lambda x: x.square().cumsum(0).flip(0) * x.roll(2),
    "pad": lambda x: F.pad(x.square(), (1, 2), value=3.0),
    "masked_fill": lambda x: x.square().masked_fill(x > 0, 3.0),
    "sums and means": lambda x: x.view(2, 3).square().mean(0) * x.sum() + x.view(2, 3).sum(-1)[0],
    "index_add": lambda x: torch.zeros_like(x).index_add(0, torch.tensor([1, 1, 2]), x[:3] ** 2),
    "average pooling": lambda x: F.avg_pool1d(x.view(1, 1, 6).sin(), 2),
    "dropout in evaluation": lambda x: F.dropout(x.square(), 0.5, training=False),
    "other dtypes": lambda x: (x.float() ** 2).double() + x.to(torch.float64) ** 3,
}
REDUCTIONS: dict[str, Func] = {
    "softmax": lambda x: x.view(2, 3).square().softmax(0),
    "softmax of F": lambda x: F.softmax(x.sin() * 2, dim=-1) + x.softmax(0, torch.float64),
    "log_softmax": lambda x: F.log_softmax(x.square().view(2, 3), 1),
    "log_softmax of plain inputs": lambda x: x.log_softmax(0),
    "logsumexp": lambda x: x.view(2, 3).sin().logsumexp(1) + torch.logsumexp(x, 0, keepdim=True),
    "logsumexp of infinities": lambda x: x.masked_fill(x > 0.5, -torch.inf).logsumexp(0),
    "max": lambda x: (x**2).max() + (x**3).view(2, 3).max(1).values + (x**2).amax() + x.min(),
    "sort and topk": lambda x: (x.sin() ** 2).sort().values + x.square().topk(1).values,
    "var and std": lambda x: x.view(2, 3).sin().var(1) + x.std() + x.var(unbiased=False),
    "norm": lambda x: x.sin().norm() + torch.linalg.norm(x) + x.view(2, 3).norm(dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x.sin(), 1) + torch.linalg.vector_norm(x),
    "layer_norm": lambda x: F.layer_norm(x.sin().view(2, 3), (3,), C[:3], C[3:]),
    "rms_norm": lambda x: F.rms_norm(x, (6,), C),
    "group_norm": lambda x: F.group_norm(x.sin().view(1, 2, 3), 2, C[:2], C[2:4]),
    "batch_norm in evaluation": lambda x: nn.BatchNorm1d(6).double().eval()(x.view(1, 6) ** 2),
    "batch_norm of torch": lambda x: torch.batch_norm(
        x.view(2, 3).sin(), C[:3], C[3:], B[:3], B[1:].square(), False, 0.1, 1e-5, False
    ),
    "batch_norm by the batch": lambda x: F.batch_norm(
        x.view(3, 2) ** 2, None, None, C[:2], C[2:4], training=True
    ),
    "instance_norm": lambda x: F.instance_norm(x.view(1, 2, 3).sin(), weight=C[:2], bias=C[2:4]),
    "normalize": lambda x: F.normalize(x.view(2, 3).sin(), dim=1),
    "distances": lambda x: torch.cdist(x.view(3, 2), x.view(3, 2).sin() + 1),
    "mse_loss": lambda x: F.mse_loss(x.sin(), x.cos()),
    "attention": lambda x: F.scaled_dot_product_attention(
        *(x.view(1, 3, 2) * k for k in (1.0, 2.0, 3.0)), is_causal=True
    ),
}
DETERMINANTS: dict[str, Func] = {
    "slogdet": lambda x: torch.linalg.slogdet(matrix(x)).logabsdet,
    "slogdet of batches": lambda x: torch.slogdet(
        torch.stack([matrix(x), matrix(x).T @ matrix(x)])
    )[1],
    "logdet": lambda x: torch.logdet(matrix(x) @ matrix(x).T),
    "inv": lambda x: torch.linalg.inv(matrix(x)),
    "solve": lambda x: torch.linalg.solve(matrix(x), x[:3].sin()),
    "solve, many": lambda x: torch.linalg.solve(matrix(x), DRAWN[3, 2]),
    "solve, by a constant": lambda x: torch.linalg.solve(DRAWN[3, 3], matrix(x)),
}
RULES = ELEMENTWISE | ARITHMETIC | LINEAR | REDUCTIONS | DETERMINANTS
POINT = torch.tensor([0.7, -0.5, 1.3, 0.2, -1.1, 0.9], dtype=torch.float64)


def diagonal_of(func: Func, x: Tensor) -> Tensor:
    """The diagonal ``[*out, *in]`` of the looped Hessian."""
    hessian = looped_hessian(func, (x,))
    shape = hessian.shape[: hessian.dim() - 2 * x.dim()]
    square = hessian.reshape(*shape, x.numel(), x.numel())
    return square.diagonal(dim1=-2, dim2=-1).reshape(*shape, *x.shape)


OTHERWISE: dict[str, Func] = {
    "distances": lambda x: (x.view(3, 1, 2) - x.view(3, 2).sin() - 1).square().sum(-1).sqrt(),
    "power of zero": lambda x: torch.stack(
        [(x[k] - x[k].detach()).square() if k in (2, 4) else 0 * x[k] for k in range(6)]
    ),
}
"""The same second derivatives by other operations, where torch has none, or nan."""


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_right_and_no_sweep_runs(name: str, caplog: Log) -> None:
    func = RULES[name]
    with caplog.at_level("INFO", "jacfunc"):
        value, jacobian, laplacian = jacfunc.value_jacobian_laplacian(func)(POINT)
        diagonal = jacfunc.hessian_diagonal(func)(POINT)
    assert caplog.messages == []
    expected = diagonal_of(OTHERWISE.get(name, func), POINT)
    close = {"rtol": 1e-5, "atol": 1e-5} if name == "other dtypes" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(value, func(POINT))
    torch.testing.assert_close(diagonal, expected, **close)
    torch.testing.assert_close(laplacian, expected.sum(-1), **close)
    torch.testing.assert_close(jacobian, jacfunc.jacrev(func)(POINT), **close)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_right_under_vmap(name: str) -> None:
    func = RULES[name]
    if name in ("indexing", "index_add"):
        pytest.skip("torch's vmap refuses the function")
    points = torch.stack([POINT, POINT * 0.9 + 0.05])
    batch = jacfunc.vmap(jacfunc.laplacian(func))(points)
    singles = [jacfunc.laplacian(func)(point) for point in points]
    torch.testing.assert_close(batch, torch.stack(singles), rtol=1e-9, atol=1e-9)
