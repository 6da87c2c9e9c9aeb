"""Solves of normal equations, against ``torch.linalg.solve`` of dense matrices in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import jacfunc
from jacfunc.operators import Cholesky, ConjugateGradient, LinearOperator, Space

WIDE, TALL = (5, 12), (12, 5)
SHAPES = pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
SOLVERS = pytest.mark.parametrize("solver", [None, Cholesky(), ConjugateGradient(rtol=1e-12)])
SIDES = pytest.mark.parametrize("side", ["rows", "columns"])
double = torch.float64


class OfMatrix(LinearOperator):
    """The operator of a matrix, which counts its products."""

    def __init__(self, matrix: Tensor, is_symmetric: bool = False) -> None:
        domain, codomain = (Space.of(matrix.new_ones(n)) for n in reversed(matrix.shape))
        super().__init__("OfMatrix", domain, codomain)
        self.dense, self.is_symmetric, self.pushed, self.pulled = matrix, is_symmetric, 0, 0

    def pushforward_batch(self, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.pushed += len(tangents[0])
        return (tangents[0] @ self.dense.T,)

    def pullback_batch(self, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.pulled += len(cotangents[0])
        return (cotangents[0] @ self.dense,)


def of_shape(shape: tuple[int, int], dtype: torch.dtype = double) -> OfMatrix:
    return OfMatrix(torch.randn(shape, dtype=dtype))


def gram_of(matrix: Tensor, side: str, center: bool = False) -> Tensor:
    matrix = matrix.double()
    if center:
        matrix = matrix - matrix.mean(0)
    return matrix @ matrix.T if side == "rows" else matrix.T @ matrix


def expected(matrix: Tensor, b: Tensor, side: str, damping: float, center: bool = False) -> Tensor:
    gram = gram_of(matrix, side, center)
    return torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=double), b.double())


def near(left: Tensor, right: Tensor, rtol: float = 1e-9) -> bool:
    return bool((left - right).norm() <= rtol * right.norm())


# --- both sides, damped ---


@SHAPES
@SOLVERS
@SIDES
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("count", [(), (3,)], ids=["one", "several"])
def test_the_dense_solution(shape: Any, solver: Any, side: str, center: bool, count: Any) -> None:
    op = of_shape(shape)
    b = torch.randn(shape[side == "columns"], *count, dtype=double)
    x = op.solve(b, damping=0.1, side=side, center=center, solver=solver)
    assert x.shape == b.shape
    assert near(x, expected(op.dense, b, side, 0.1, center))
    assert torch.equal(x, op.solve(b, damping=0.1, center=center, solver=solver))


@SHAPES
@SOLVERS
@pytest.mark.parametrize("center", [False, True])
def test_least_squares_with_damping(shape: Any, solver: Any, center: bool) -> None:
    op, b = of_shape(shape), torch.randn(shape[0], 2, dtype=double)
    x = op.lstsq(b, damping=0.1, center=center, solver=solver)
    matrix = op.dense - op.dense.mean(0) if center else op.dense
    assert near(x, expected(op.dense, matrix.T @ b, "columns", 0.1, center))


# --- without damping ---


@SHAPES
def test_least_squares_without_damping(shape: Any) -> None:
    op, b = of_shape(shape), torch.randn(shape[0], dtype=double)
    assert near(op.lstsq(b), torch.linalg.pinv(op.dense) @ b)


@SOLVERS
def test_a_regular_smaller_side_needs_no_damping(solver: Any) -> None:
    for shape, side in ((WIDE, "rows"), (TALL, "columns")):
        op, b = of_shape(shape), torch.randn(5, dtype=double)
        assert near(op.solve(b, solver=solver), expected(op.dense, b, side, 0.0), 1e-8)


def test_the_larger_side_needs_damping() -> None:
    with pytest.raises(ValueError, match=r"^OfMatrix: damping must be positive .* 12 and 5"):
        of_shape(WIDE).solve(torch.ones(12, dtype=double))


@pytest.mark.parametrize("dtype", [double, torch.float32])
def test_a_singular_matrix_is_refused(dtype: torch.dtype) -> None:
    matrix = torch.randn(WIDE, dtype=dtype)
    matrix[3] = matrix[1]
    op, b = OfMatrix(matrix), torch.ones(5, dtype=dtype)
    with pytest.raises(ValueError, match=r"^OfMatrix: the matrix plus damping must be positive"):
        op.solve(b)
    assert op.solve(b, damping=1e-3).isfinite().all()


def test_rank_by_rounding_alone_is_none() -> None:
    """In float32 a row that is twice another one, and has been through one rounding more."""
    matrix = torch.randn(WIDE)
    matrix[3] = (matrix[1] + matrix[2] * 0.1) - matrix[2] * 0.1
    with pytest.raises(ValueError, match="beyond what rounding changes"):
        OfMatrix(matrix).solve(torch.ones(5))


def test_numbers_that_are_not_finite_are_refused() -> None:
    matrix = torch.randn(WIDE, dtype=double)
    matrix[0, 0] = float("nan")
    b = torch.ones(5, dtype=double)
    with pytest.raises(ValueError, match="or finite numbers"):
        OfMatrix(matrix).solve(b, damping=1.0)
    with pytest.raises(RuntimeError, match="residual must fall"):
        OfMatrix(matrix).solve(b, damping=1.0, solver=ConjugateGradient())


# --- the smaller side alone is formed ---


@SIDES
def test_a_matrix_that_is_formed_takes_the_smaller_side(side: str) -> None:
    for shape in (WIDE, TALL):
        op = of_shape(shape)
        op.solve(torch.ones(shape[side == "columns"], dtype=double), damping=1.0)
        is_own = (side == "rows") == (shape == WIDE)
        assert op.pushed + op.pulled == 5 + (0 if is_own else 2)


# --- trees, dtypes, forms ---


def tree_function(x: Any) -> Any:
    return {"a": torch.outer(x["u"], x["v"]).sin(), "b": x["u"] * x["v"].sum()}


def test_trees_and_flat_vectors() -> None:
    point = {"u": torch.randn(3, dtype=double), "v": torch.randn(2, dtype=double)}
    value, J = jacfunc.linearize(tree_function, point)
    dense = J.matrix()
    flat = J.codomain.flat(value)
    assert near(J.codomain.flat(J.solve(value, damping=0.5)), expected(dense, flat, "rows", 0.5))
    assert near(
        J.domain.flat(J.solve(point, damping=0.5)), J.solve(J.domain.flat(point), damping=0.5)
    )
    step = J.lstsq(value, damping=0.5)
    assert set(step) == {"u", "v"}
    assert near(J.domain.flat(step), expected(dense, dense.T @ flat, "columns", 0.5))
    centred = dense.view(9, 5).clone()
    centred[:6] -= dense[:6].view(3, 2, 5).mean(0).repeat(3, 1)
    centred[6:] -= dense[6:].mean(0)
    assert near(J.gram(center=True), centred @ centred.T)


def test_a_gram_adds_up_in_the_dtype_that_is_asked_for() -> None:
    op = of_shape((5, 400), torch.float32)
    assert op.gram().dtype == torch.float32
    assert near(op.gram(dtype=double), gram_of(op.dense, "rows"), 1e-14)


def test_float32_with_a_condition_of_a_million() -> None:
    """``K`` has a condition of 10¹², and a float32 Cholesky would fail."""
    u, _ = torch.linalg.qr(torch.randn(20, 20, dtype=double))
    v, _ = torch.linalg.qr(torch.randn(50, 20, dtype=double))
    matrix = (u * torch.logspace(0, -6, 20, dtype=double) @ v.T).float()
    op, b = OfMatrix(matrix), torch.randn(20)
    damping = 1e-9
    assert torch.linalg.cholesky_ex(matrix @ matrix.T + damping * torch.eye(20)).info > 0
    assert near(op.solve(b, damping=damping).double(), expected(matrix, b, "rows", damping), 1e-5)


def test_centring_before_contraction_keeps_float32_right() -> None:
    """``‖K‖ / ‖Kc‖`` is 10⁵: what is centred after a float32 contraction errs by percents."""
    matrix = torch.randn(64, 3000) * 1e-2 + 3 * torch.randn(3000)
    exact = gram_of(matrix, "rows", center=True)
    after = matrix @ matrix.T
    assert after.norm() / exact.norm() > 1e5
    after = after - after.mean(0)
    after = after - after.mean(1, keepdim=True)
    assert not near(after.double(), exact, 0.01)
    assert near(OfMatrix(matrix).gram(center=True).double(), exact, 1e-3)


# --- derivatives ---


@pytest.mark.parametrize("solver", [Cholesky(), ConjugateGradient(rtol=1e-13)])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_derivatives_by_b(solver: Any, shape: Any) -> None:
    op, b = of_shape(shape), torch.randn(shape[0], dtype=double, requires_grad=True)
    solve = partial(op.solve, damping=0.3, side="rows", solver=solver)
    assert torch.autograd.gradcheck(solve, b)
    assert torch.autograd.gradgradcheck(lambda b: solve(b).square(), b)
    assert near(torch.func.jacrev(solve)(b.detach()), solve(torch.eye(shape[0], dtype=double)))


def test_derivatives_by_the_point() -> None:
    point = torch.randn(4, dtype=double, requires_grad=True)
    b = torch.randn(3, dtype=double)

    def func(x: Tensor) -> Tensor:
        return torch.stack([x.prod(), x.sin().sum(), x[0] * x[2]])

    def step(x: Tensor, **how: Any) -> Any:
        _, J = jacfunc.linearize(func, x)
        return J.lstsq(b, damping=0.2, **how)

    assert torch.autograd.gradcheck(step, point)
    with pytest.raises(
        NotImplementedError, match="must be constant, got one that is differentiated"
    ):
        step(point, solver=ConjugateGradient())
    with torch.no_grad():
        assert near(step(point, solver=ConjugateGradient(rtol=1e-12)), step(point))


def test_ensembles() -> None:
    points, b = torch.randn(5, 4, dtype=double), torch.randn(4, dtype=double)

    def step(x: Tensor, **how: Any) -> Any:
        _, J = jacfunc.linearize(lambda x: x.sin().cumsum(0), x)
        return J.solve(b, damping=0.2, side="rows", **how)

    for vmap in (torch.vmap, jacfunc.vmap):
        assert near(vmap(step)(points), torch.stack([step(x) for x in points]))
    with pytest.raises(NotImplementedError, match="differentiated or vmapped"):
        torch.vmap(partial(step, solver=ConjugateGradient()))(points)

    def singular(x: Tensor) -> Any:
        _, J = jacfunc.linearize(lambda x: x.sum() * torch.ones(4, dtype=double), x)
        return J.solve(b, side="rows")

    with pytest.raises(ValueError, match="must be positive definite"):
        torch.vmap(singular)(points)


# --- symmetric operators ---


def symmetric(size: int = 6) -> Tensor:
    root = torch.randn(size, size, dtype=double)
    return root @ root.T


@SOLVERS
def test_a_symmetric_operator_is_solved_itself(solver: Any) -> None:
    matrix, b = symmetric(), torch.randn(6, 2, dtype=double)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(6, dtype=double), b)
    op = OfMatrix(matrix, is_symmetric=True)
    assert near(op.solve(b, damping=0.1, solver=solver), exact)
    assert near(OfMatrix(matrix).solve(b, damping=0.1, side="both", solver=solver), exact)
    assert near((op * 0.5 + 0.5 * op).T.solve(b, damping=0.1, solver=solver), exact)
    both = op.solve(b, damping=0.1, side="rows", solver=solver)
    assert near(both, expected(matrix, b, "rows", 0.1), 1e-7)


@pytest.mark.parametrize("solver", [Cholesky(), ConjugateGradient()])
def test_an_indefinite_matrix_is_refused(solver: Any) -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0, 3.0], dtype=double))
    with pytest.raises(ValueError, match=r"^OfMatrix: the matrix plus damping must be positive"):
        OfMatrix(matrix, is_symmetric=True).solve(torch.ones(3, dtype=double), solver=solver)


def test_what_is_not_symmetric_is_not_solved_itself() -> None:
    with pytest.raises(ValueError, match="takes a symmetric matrix"):
        of_shape((4, 4)).solve(torch.ones(4, dtype=double), damping=1.0, side="both")
    with pytest.raises(ValueError, match="two operators must agree"):
        of_shape(WIDE).solve(torch.ones(12, dtype=double), damping=1.0, side="both")


def test_a_square_operator_does_not_guess() -> None:
    with pytest.raises(ValueError, match=r"^OfMatrix: side must be said where b fits both"):
        of_shape((4, 4)).solve(torch.ones(4, dtype=double), damping=1.0)


@SOLVERS
@SHAPES
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_an_inverse_is_what_solves(side: Any, shape: Any, solver: Any) -> None:
    op = of_shape(shape)
    inverse = op.inverse(damping=0.1, side=side, solver=solver)
    gram = gram_of(op.dense, side)
    exact = torch.linalg.inv(gram + 0.1 * torch.eye(len(gram), dtype=double))
    assert near(inverse.matrix(), exact)
    assert near(inverse.T.matrix(), exact)
    other = OfMatrix(symmetric(5), is_symmetric=True)
    root = torch.randn(3, 5, dtype=double)
    posterior = other.inverse(damping=1.0, solver=solver)
    exact = torch.linalg.inv(other.dense + torch.eye(5, dtype=double))
    assert near(OfMatrix(root).quad(posterior), root @ exact @ root.T)


def test_an_inverse_is_factored_once() -> None:
    op = OfMatrix(symmetric(), is_symmetric=True)
    inverse = op.inverse()
    count = op.pushed + op.pulled
    inverse.mm(torch.randn(6, 9, dtype=double))
    assert op.pushed + op.pulled == count


# --- iterations ---


def test_iterations_that_do_not_converge_are_an_error() -> None:
    op, b = of_shape((30, 40)), torch.randn(30, dtype=double)
    with pytest.raises(RuntimeError, match=r"^OfMatrix: the residual .* when products ran out"):
        op.solve(b, damping=1e-6, solver=ConjugateGradient(rtol=1e-10, maxiter=5))
    op = of_shape((30, 40), torch.float32)
    solver = ConjugateGradient(rtol=1e-7, maxiter=10_000)
    with pytest.raises(RuntimeError, match="when it fell no more"):
        op.solve(torch.ones(30), damping=1e-3, solver=solver)


def test_iterations_take_as_many_products_as_there_are_eigenvalues() -> None:
    op = OfMatrix(torch.diag(torch.tensor([1.0, 2.0, 3.0] * 40, dtype=double)))
    op.solve(torch.randn(120, dtype=double), side="rows", solver=ConjugateGradient(rtol=1e-10))
    assert op.pushed <= 6


def test_a_right_hand_side_of_zeros() -> None:
    op = of_shape(WIDE)
    b = torch.stack([torch.zeros(5, dtype=double), torch.randn(5, dtype=double)], 1)
    for solver in (Cholesky(), ConjugateGradient(rtol=1e-12)):
        x = op.solve(b, damping=0.1, solver=solver)
        assert not x[:, 0].any()
        assert near(x, expected(op.dense, b, "rows", 0.1))


# --- A S Aᵀ ---


@SHAPES
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_quadratic_form(shape: Any, per_sample: bool) -> None:
    op, size = of_shape(shape), shape[1]
    diagonal, dense = torch.randn(size, dtype=double), torch.randn(size, size, dtype=double)
    for middle, matrix in (
        (diagonal, torch.diag(diagonal)),
        (dense, dense),
        (OfMatrix(dense), dense),
    ):
        exact = op.dense @ matrix @ op.dense.T
        exact = exact.diagonal()[:, None, None] if per_sample else exact
        assert near(op.quad(middle, per_sample=per_sample), exact)


def test_a_quadratic_form_of_samples_in_trees() -> None:
    point = {"u": torch.randn(3, dtype=double), "v": torch.randn(2, dtype=double)}
    _, J = jacfunc.linearize(tree_function, point)
    variances = {"u": torch.rand(3, dtype=double), "v": torch.rand(2, dtype=double)}
    dense, spread = J.matrix(), torch.diag(J.domain.flat(variances))
    rows = torch.cat([dense[:6].view(3, 2, 5), dense[6:].view(3, 1, 5)], 1)
    assert near(J.quad(variances, per_sample=True), rows @ spread @ rows.mT)
    assert near(J.quad(variances), dense @ spread @ dense.T)


def test_products_without_samples() -> None:
    _, J = jacfunc.linearize(lambda x: x.sum(), torch.ones(3))
    for call in (partial(J.gram, center=True), partial(J.quad, torch.ones(3), per_sample=True)):
        with pytest.raises(ValueError, match="must have the samples in front"):
            call()
