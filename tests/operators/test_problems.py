"""``linearize`` on every problem: products, blocks and second derivatives beside the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jacfunc.operators import LinearOperator, linearize
from tests.kinds.problems import PROBLEMS, Problem
from tests.strategies.test_problems import cases, copied
from tests.truth.oracles import (
    assert_same,
    finite_differences,
    float_leaves,
    is_real_tensor,
    on_picked,
    picked,
    tree_map,
)
from tests.truth.reference import promoted, reference_hessian, reference_jacobian, tolerance

EVERY = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def call_of(problem: Problem, device: str, dtype: torch.dtype) -> tuple[Any, tuple[Any, ...]]:
    """The problem as a function of what is differentiated, and its arguments."""
    args, numbers = problem.make_args(device, dtype), problem.argnums
    func = on_picked(problem.func, args, numbers, problem.kwargs)
    if isinstance(numbers, int):
        return func, (args[numbers],)
    return lambda *chosen: func(chosen), tuple(args[n] for n in numbers)


def dense(jacobian: Any, output: Any, chosen: Any) -> Tensor:
    """The matrix ``[M, N]`` in float64 of blocks ``[*out_i, *in_j]``."""
    blocks, ins, outs = iter(float_leaves(jacobian)), float_leaves(chosen), float_leaves(output)
    rows = [
        torch.cat([next(blocks).double().reshape(y.numel(), x.numel()) for x in ins], 1)
        for y in outs
    ]
    return torch.cat(rows)


def push(J: LinearOperator, v: Tensor) -> Tensor:
    """``J v`` of numbers in a row; one vector goes as a tree."""
    return J @ v if v.dim() == 2 else J.codomain.flat(J @ J.domain.tree(v))


def pull(J: LinearOperator, u: Tensor) -> Tensor:
    """``Jᵀ u`` of numbers in a row; one vector goes as a tree."""
    return J.T @ u if u.dim() == 2 else J.domain.flat(J.T @ J.codomain.tree(u))


def vectors(size: int, count: int, like: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, count, generator=generator, dtype=torch.float64).to(like)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_and_blocks_are_those_of_the_reference(
    problem: Problem, dtype: torch.dtype, device: str
) -> None:
    func, primals = call_of(problem, device, dtype)
    output = func(*copied(primals))
    chosen = primals if isinstance(problem.argnums, tuple) else primals[0]
    truth = reference_jacobian(problem.name, device)
    close, matrix = tolerance(primals, output), dense(truth, output, chosen)

    value, J = linearize(func, *primals)
    assert_same(value, output, rtol=0, atol=0)
    assert J.shape == matrix.shape
    V = vectors(J.shape[1], 3, J.domain.dtype, 1)
    U = vectors(J.shape[0], 2, J.codomain.dtype, 2)
    pushed, pulled = matrix @ V.double(), matrix.T @ U.double()
    # tangents, before there is a graph; then pullbacks; then tangents on the graph
    for actual, expected in (
        (push(J, V), pushed),
        (push(J, V[:, 0]), pushed[:, 0]),
        (pull(J, U), pulled),
        (pull(J, U[:, 0]), pulled[:, 0]),
        (push(J, V), pushed),
        (push(J, V[:, 0]), pushed[:, 0]),
        (J.rmm(U), pulled),
        (J.matrix(), matrix),
        (J.matrix(chunk_size=2), matrix),
    ):
        torch.testing.assert_close(actual.double(), expected, **close)
    truth = promoted(truth, output, chosen)
    if len(primals) == 1 and isinstance(problem.argnums, tuple):  # one primal makes no tuple
        assert_same(float_leaves(J.tree()), float_leaves(truth), **close)
    else:
        assert_same(J.tree(), truth, **close)


@EVERY
def test_the_adjoint_identity_and_linearity(problem: Problem, device: str) -> None:
    func, primals = call_of(problem, device, torch.float64)
    _, J = linearize(func, *primals)
    close = tolerance(primals, func(*copied(primals)))
    v, w = vectors(J.shape[1], 2, J.domain.dtype, 3).unbind(1)
    (u,) = vectors(J.shape[0], 1, J.codomain.dtype, 4).unbind(1)
    inner = (u * push(J, v)).sum(), (pull(J, u) * v).sum()
    torch.testing.assert_close(*(x.double() for x in inner), **close)
    combined = 2 * push(J, v) - 3 * push(J, w)
    torch.testing.assert_close(push(J, 2 * v - 3 * w), combined, **close)
    torch.testing.assert_close(pull(J, -5 * u), -5 * pull(J, u), **close)


@cases(having="differences")
def test_products_agree_with_differences(problem: Problem, device: str) -> None:
    func, primals = call_of(problem, device, torch.float64)
    numbers = tuple(range(len(primals))) if isinstance(problem.argnums, tuple) else 0
    differences = finite_differences(func, primals, numbers)
    matrix = dense(differences, func(*copied(primals)), picked(primals, numbers))
    _, J = linearize(func, *primals)
    V, U = vectors(J.shape[1], 3, torch.float64, 1), vectors(J.shape[0], 3, torch.float64, 2)
    torch.testing.assert_close(J @ V, matrix @ V, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(J.T @ U, matrix.T @ U, rtol=1e-5, atol=1e-6)


def tensors_of_second_derivatives(problem: Problem, device: str) -> Tensor:
    """``[M, N, N]`` from the looped reference."""
    func, primals = call_of(problem, device, torch.float64)
    ins, outs = float_leaves(primals), float_leaves(func(*copied(primals)))
    blocks = iter(float_leaves(reference_hessian(problem.name, device)))
    rows = []
    for y in outs:
        parts = [
            [next(blocks).double().reshape(y.numel(), a.numel(), b.numel()) for b in ins]
            for a in ins
        ]
        rows.append(torch.cat([torch.cat(row, 2) for row in parts], 1))
    return torch.cat(rows)


def product(J: LinearOperator, order: str, v: Tensor, u: Tensor) -> Tensor:
    """``uᵀ J v``, by a push, by a pullback, or by a push after a pullback."""
    if order == "pull":
        return (pull(J, u) * v).sum()
    if order == "push after pull":
        pull(J, u.detach())
    return (u * push(J, v)).sum()


@pytest.mark.parametrize("order", ["push", "pull", "push after pull"])
@cases(having="smooth")
def test_derivatives_through_a_product_are_second_derivatives(
    problem: Problem, order: str, device: str
) -> None:
    func, primals = call_of(problem, device, torch.float64)
    followed = tree_map(
        lambda x: x.clone().requires_grad_() if is_real_tensor(x) else x, list(primals)
    )
    second = tensors_of_second_derivatives(problem, device)
    _, J = linearize(func, *followed)
    v = vectors(J.shape[1], 1, J.domain.dtype, 5)[:, 0].requires_grad_()
    u = vectors(J.shape[0], 1, J.codomain.dtype, 6)[:, 0].requires_grad_()
    matrix = J.matrix().detach().double()
    _, J = linearize(func, *followed)
    number = product(J, order, v, u)
    leaves = float_leaves(followed)
    slopes = torch.autograd.grad(number, [*leaves, v, u], materialize_grads=True)
    close = tolerance(primals, func(*copied(primals)), double=1e-7)
    by_point = torch.cat([slope.double().flatten() for slope in slopes[:-2]])
    expected = torch.einsum("ijk,i,j->k", second, u.double(), v.double())
    torch.testing.assert_close(by_point, expected, **close)
    torch.testing.assert_close(slopes[-2].double(), u.double() @ matrix, **close)
    torch.testing.assert_close(slopes[-1].double(), matrix @ v.double(), **close)
