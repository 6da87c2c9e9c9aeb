"""Nodes whose backward pass is a user's: how rows go through them, and what they may write into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jacfunc
from tests.settled.test_sweeps import num_sweeps

W = torch.randn(4, 3, dtype=torch.float64)


class Cube(torch.autograd.Function):
    """By NumPy, so that it takes no several rows at once; its cotangent it writes into."""

    rows = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        Cube.rows += 1
        numbers = grad.detach().numpy()
        numbers *= 3 * ctx.saved_tensors[0].numpy() ** 2
        return torch.from_numpy(numbers)


class Writing(Cube):
    """By torch, so that it takes them at once."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.mul_(3 * ctx.saved_tensors[0] ** 2)


class Kept(Cube):
    """Returns the same memory each time, but for cotangents of which the first number is 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = torch.empty_like(x)
        return Cube.forward(ctx, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        slope = 3 * ctx.saved_tensors[0].numpy() ** 2
        return None if grad.numpy()[0] == 2 else ctx.kept.copy_(torch.from_numpy(slope) * grad)


def test_all_other_nodes_take_all_rows_at_once() -> None:
    def f(x: Tensor) -> Tensor:
        out: Tensor = W @ Cube.apply(x)
        return out

    x = torch.randn(3, dtype=torch.float64)
    Cube.rows = 0
    assert num_sweeps(lambda: jacfunc.jacrev(f)(x)) == 2  # the first of which fails
    assert Cube.rows == 1 + 4
    torch.testing.assert_close(jacfunc.jacrev(f)(x), W * 3 * x**2)


def test_of_many_numbers_rows_go_one_by_one() -> None:
    x = torch.randn(2**15, dtype=torch.float64)
    derive = jacfunc.jacrev(lambda x: Cube.apply(x)[:3])
    assert num_sweeps(lambda: derive(x)) == 1 + 3
    expected = torch.diag_embed(3 * x[:3] ** 2)
    torch.testing.assert_close(derive(x)[:, :3], expected)


@pytest.mark.parametrize("function", [Cube, Writing])
@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
@pytest.mark.parametrize("size", [3, 300])
def test_what_they_write_into_is_nobody_elses(function: Any, strategy: Any, size: int) -> None:
    for _ in range(20):
        x = torch.randn(size, dtype=torch.float64)
        found = jacfunc.jacobian(lambda x: function.apply(x)[:3], strategy=strategy)(x)
        torch.testing.assert_close(found, torch.diag(3 * x**2)[:3])
        found = jacfunc.jacobian(function.apply, strategy=strategy)(x)
        torch.testing.assert_close(found, torch.diag(3 * x**2))


@pytest.mark.parametrize("function", [Cube, Writing])
def test_a_cotangent_of_the_callers_stays_as_it_is(function: Any) -> None:
    x, v = torch.randn(2, 3, dtype=torch.float64)
    given = v.clone()
    _, J = jacfunc.linearize(function.apply, x)
    for _ in range(2):
        torch.testing.assert_close(J.T @ v, 3 * x**2 * given)
        assert torch.equal(v, given)


@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
@pytest.mark.parametrize("first", [1.0, 2.0])  # where some rows are left out, all go one by one
def test_what_they_return_may_be_written_into_later(strategy: Any, first: float) -> None:
    factors = torch.tensor([first, 1.0, 1.0], dtype=torch.float64)
    for f in (lambda x: factors * Kept.apply(x), lambda x: factors * Kept.apply(1 * x + 0)):
        x = torch.randn(3, dtype=torch.float64)
        found = jacfunc.jacobian(f, strategy=strategy)(x)
        torch.testing.assert_close(found, torch.diag((factors % 2) * 3 * x**2))


def test_products_stay_as_they_are_when_others_are_made() -> None:
    x, u, v = torch.randn(3, 3, dtype=torch.float64)
    _, pullback = jacfunc.vjp(Kept.apply, x)
    (first,), _ = pullback(u), pullback(v)
    torch.testing.assert_close(first, 3 * x**2 * u)
    x.requires_grad_()
    out: Any = Kept.apply(x)
    rows = [jacfunc.graph_jacobian(out[:n], x, retain_graph=True) for n in (1, 2)]
    torch.testing.assert_close(rows[0], rows[1][:1])
