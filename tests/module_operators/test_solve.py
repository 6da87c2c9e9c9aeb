"""Solves with the Jacobians of modules, against float64 and dense matrices."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc.operators import ConjugateGradient, LinearOperator

double = torch.float64


def perceptron(outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, outputs))


class Convolutional(nn.Module):
    """Several positions, a parameter that is used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)
        self.head, self.idle = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tanh(self.norm(self.conv(x)))
        return self.head(seen.mean(-1)) + self.head(seen.amax(-1))


CASES: dict[str, tuple[Any, Tensor]] = {
    "perceptron": (perceptron, torch.randn(7, 6)),
    "three outputs": (lambda: perceptron(3), torch.randn(7, 6)),
    "more rows than parameters": (lambda: nn.Linear(3, 2), torch.randn(9, 3)),
    "convolutional": (Convolutional, torch.randn(5, 2, 8)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
CENTER = pytest.mark.parametrize("center", [False, True])


def at(case: str, **options: Any) -> tuple[LinearOperator, Tensor]:
    """The operator in float64, and J by rows of ``autograd.grad``."""
    make, x = CASES[case]
    model, x = make().double(), x.double()
    out = model(x)
    params = tuple(model.parameters())
    rows = []
    for number in out.flatten():
        grads = torch.autograd.grad(
            number, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    operator = jacfunc.module_operator(model, per_sample=True, **options)(x)
    return operator, torch.stack(rows)


def centred(matrix: Tensor, count: int) -> Tensor:
    by_sample = matrix.view(count, -1, matrix.shape[1])
    return (by_sample - by_sample.mean(0)).view(matrix.shape)


def near(left: Tensor, right: Tensor, rtol: float = 1e-9) -> bool:
    return bool((left - right).norm() <= rtol * right.norm())


@EVERY_CASE
@CENTER
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_gramian(case: str, center: bool, chunk_size: Any) -> None:
    op, dense = at(case, chunk_size=chunk_size)
    matrix = centred(dense, len(CASES[case][1])) if center else dense
    assert near(op.gram(center=center), matrix @ matrix.T)


@EVERY_CASE
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_the_matrix(case: str, chunk_size: Any) -> None:
    op, dense = at(case)
    assert near(op.matrix(chunk_size=chunk_size), dense)
    assert near(op.T.matrix(), dense.T)


@EVERY_CASE
@CENTER
@pytest.mark.parametrize("solver", [None, ConjugateGradient(rtol=1e-12)])
def test_solves(case: str, center: bool, solver: Any) -> None:
    op, dense = at(case)
    matrix = centred(dense, len(CASES[case][1])) if center else dense
    u, v = torch.randn(len(dense), 2, dtype=double), torch.randn(dense.shape[1], dtype=double)
    how: Any = {"damping": 0.1, "center": center, "solver": solver}
    left, right = (
        gram + 0.1 * torch.eye(len(gram), dtype=double)
        for gram in (matrix @ matrix.T, matrix.T @ matrix)
    )
    assert near(op.solve(u, **how), torch.linalg.solve(left, u))
    assert near(op.solve(v, **how), torch.linalg.solve(right, v))
    assert near(op.lstsq(u, **how), torch.linalg.solve(right, matrix.T @ u))


def test_the_gramian_takes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    op, dense = at("three outputs")

    def refuse(_: Any) -> Any:
        raise AssertionError("a product was taken")

    monkeypatch.setattr(op, "pullback_batch", refuse)
    monkeypatch.setattr(op, "pushforward_batch", refuse)
    assert near(op.gram(), dense @ dense.T)
    assert near((-0.5 * op).gram(), dense @ dense.T / 4)
    blocks = dense.view(7, 3, -1) @ dense.view(7, 3, -1).mT
    assert near(
        (op * 3).quad(torch.ones(op.domain.size, dtype=double), per_sample=True), 9 * blocks
    )
    assert near(
        op.solve(torch.ones(21, dtype=double), damping=1.0),
        torch.linalg.solve(dense @ dense.T + torch.eye(21), torch.ones(21, dtype=double)),
    )


@EVERY_CASE
def test_a_quadratic_form_of_each_sample(case: str) -> None:
    """The variance of outputs that a Laplace approximation has."""
    op, dense = at(case)
    count, size = len(CASES[case][1]), dense.shape[1]
    diagonal, root = torch.rand(size, dtype=double), torch.randn(size, size, dtype=double)
    rows = dense.view(count, -1, size)
    for middle, matrix in ((diagonal, torch.diag(diagonal)), (root @ root.T, root @ root.T)):
        assert near(op.quad(middle), dense @ matrix @ dense.T)
        assert near(op.quad(middle, per_sample=True), rows @ matrix @ rows.mT)
    by_name = op.domain.tree(diagonal)
    assert near(op.quad(by_name, per_sample=True), rows @ torch.diag(diagonal) @ rows.mT)


def test_samples_that_are_not_taken_apart_give_the_same() -> None:
    model, x = perceptron(2).double(), torch.randn(7, 6, dtype=double)
    apart, whole = (jacfunc.module_operator(model, per_sample=p)(x) for p in (True, False))
    b = torch.randn(7, 2, dtype=double)
    for center in (False, True):
        assert near(apart.gram(center=center), whole.gram(center=center))
        steps = [op.lstsq(b.flatten(), damping=0.1, center=center) for op in (apart, whole)]
        assert near(*steps)
    variances = torch.rand(apart.domain.size, dtype=double)
    assert near(apart.quad(variances, per_sample=True), whole.quad(variances, per_sample=True))


@CENTER
def test_batches_of_a_loader(center: bool) -> None:
    model, x = perceptron(2).double(), torch.randn(7, 6, dtype=double)
    operator_of = jacfunc.module_operator(model, per_sample=True)
    several, one = operator_of([x[:3], x[3:]]), operator_of(x)
    assert near(several.gram(center=center), one.gram(center=center))
    b = torch.randn(14, 3, dtype=double)
    steps = [op.lstsq(b, damping=0.1, center=center) for op in (several, one)]
    assert near(*steps)
    assert near(several.quad(torch.ones(one.domain.size, dtype=double)), one.gram())


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_products_and_the_gramian_share_the_mask(randomness: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Dropout(0.5), nn.Linear(10, 2)).double()
    op = jacfunc.module_operator(model, per_sample=True, randomness=randomness)(
        torch.randn(7, 6, dtype=double)
    )
    dense = op.matrix()
    assert near(op.gram(), dense @ dense.T)
    rows = dense.view(7, 2, -1)
    ones = torch.ones(dense.shape[1], dtype=double)
    assert near(op.quad(ones, per_sample=True), rows @ rows.mT)


def test_derivatives_by_b() -> None:
    op, dense = at("three outputs")
    b = torch.randn(len(dense), dtype=double, requires_grad=True)
    for solve in (op.lstsq, op.solve):
        assert torch.autograd.gradcheck(partial(solve, damping=0.1, center=True), b)


@pytest.mark.parametrize("per_sample", [True, False])
def test_derivatives_by_variances(per_sample: bool) -> None:
    """As of a marginal likelihood by its prior."""
    op, dense = at("three outputs")
    variances = torch.rand(dense.shape[1], dtype=double, requires_grad=True)
    quad = partial(op.quad, per_sample=per_sample)
    (gradient,) = torch.autograd.grad(quad(variances).sum(), variances)
    rows = dense.view(7, 3, -1) if per_sample else dense
    assert near(gradient, rows.sum(-2).square().view(-1, len(gradient)).sum(0))


@pytest.mark.parametrize("per_sample", [True, False])
def test_an_empty_batch(per_sample: bool) -> None:
    op = jacfunc.module_operator(perceptron(2), per_sample=per_sample)(torch.ones(0, 6))
    assert op.gram(center=True).shape == (0, 0)
    assert not any(step.any() for step in op.lstsq(torch.ones(0, 2), damping=0.1).values())
    for middle in (torch.ones(op.domain.size), torch.eye(op.domain.size)):
        assert op.quad(middle, per_sample=True).shape[0] == 0


def test_half_precision() -> None:
    model, x = perceptron(2), torch.randn(12, 6)
    half = copy.deepcopy(model).bfloat16()
    b = torch.randn(24)
    step = jacfunc.module_operator(model, per_sample=True)(x).lstsq(b, damping=0.1)
    op = jacfunc.module_operator(half, per_sample=True)(x.bfloat16())
    assert op.gram().dtype == torch.bfloat16
    assert near(op.lstsq(b.bfloat16(), damping=0.1).float(), step, 0.1)


def test_outputs_in_a_tree_and_directions_of_inputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron(2)

        def forward(self, x: Tensor) -> Any:
            return {"out": self.inner(x), "square": self.inner(x)[:, 0].square()}

    model, x = Both().double(), torch.randn(4, 6, dtype=double)
    for wrt in ("params", "inputs"):
        op = jacfunc.module_operator(model, wrt, per_sample=True)(x)
        dense = op.matrix()
        assert near(op.gram(), dense @ dense.T)
        rows = torch.cat([dense[:8].view(4, 2, -1), dense[8:].view(4, 1, -1)], 1)
        ones = torch.ones(dense.shape[1], dtype=double)
        assert near(op.quad(ones, per_sample=True), rows @ rows.mT)


@pytest.mark.parametrize(("share", "most"), [(2e-2, 1e-4), (2e-3, 1e-3)])
def test_a_centred_kernel_in_float32(share: float, most: float) -> None:
    """``‖K‖ / ‖Kc‖`` of 10³ and 10⁵: samples differ by a small part of what they are."""
    model = perceptron()
    x = torch.randn(6) + share * torch.randn(64, 6)
    ops = [
        jacfunc.module_operator(module, per_sample=True)(batch)
        for module, batch in ((model, x), (copy.deepcopy(model).double(), x.double()))
    ]
    kernel, exact = (op.gram(center=True) for op in ops)
    whole = ops[1].gram()
    assert whole.norm() > exact.norm() / share**2 / 2
    assert near(kernel.double(), exact, most)
