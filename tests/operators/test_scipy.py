"""SciPy's solvers on Jacobians: without the matrix of a CNN, and equal to a small dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jacfunc.operators import LinearOperator, linearize
from tests.operators.dense import Dense, definite, normal

linalg = pytest.importorskip("scipy.sparse.linalg")


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.itemsize
            for x in tree_leaves(result)
            if isinstance(x, Tensor) and x.layout == torch.strided
        ]
        self.numel = max([self.numel, *sizes])
        return result


def cnn_operator(dtype: torch.dtype) -> tuple[LinearOperator, int]:
    """The Jacobian of a CNN's outputs by its 10⁵ parameters, and its smaller side."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 180),
        nn.Tanh(),
        nn.Linear(180, 10),
    ).to(dtype)
    images = torch.randn(4, 1, 28, 28, dtype=dtype)
    params = {name: param.detach() for name, param in model.named_parameters()}
    _, J = linearize(lambda p: functional_call(model, p, images), params)
    assert J.shape[1] >= 100_000
    return J, J.shape[0]


def small() -> tuple[LinearOperator, np.ndarray]:
    entries = normal(7, 5, seed=3)
    _, J = linearize(lambda x: torch.tanh(entries @ x), normal(5))
    return J, J.matrix().numpy()


def test_solvers_on_a_cnn_never_form_the_matrix():
    J, rows = cnn_operator(torch.float64)
    columns = J.shape[1]
    assert 3 * columns < rows * columns / 10
    with Largest() as largest:
        theirs = J.to_scipy()
        start = np.random.default_rng(0).normal(size=rows)
        values = linalg.svds(theirs, k=2, return_singular_vectors=False, v0=start)
        kernel = (J @ J.T).to_scipy()
        (square,) = linalg.eigsh(kernel, k=1, v0=start, return_eigenvectors=False)
        target = J @ normal(columns)
        solved, *told = linalg.lsmr(theirs, target.flatten().numpy(), damp=0.1, maxiter=200)
    assert largest.numel <= 3 * columns
    matrix = J.matrix(chunk_size=rows)  # the truth, formed
    exact = torch.linalg.svdvals(matrix)
    np.testing.assert_allclose(sorted(values), sorted(exact[:2].numpy()), rtol=1e-7)
    np.testing.assert_allclose(square, float(exact[0]) ** 2, rtol=1e-7)
    # (Jᵀ J + λ²) x = Jᵀ b by the small side: x = Jᵀ (J Jᵀ + λ²)⁻¹ b
    damped = matrix @ matrix.T + 0.01 * torch.eye(rows, dtype=torch.float64)
    expected = matrix.T @ torch.linalg.solve(damped, target.flatten())
    scale = float(expected.norm())
    assert np.linalg.norm(solved - expected.numpy()) < 1e-3 * scale, told


def test_a_small_one_has_the_dense_decomposition():
    J, matrix = small()
    U, values, V = linalg.svds(J.to_scipy(), k=4, v0=np.ones(5))
    dense_U, dense_values, dense_V = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(values[::-1], dense_values[:4], rtol=1e-10)
    np.testing.assert_allclose(
        (U * values) @ V, (dense_U[:, :4] * dense_values[:4]) @ dense_V[:4], atol=1e-10
    )


@pytest.mark.parametrize("combine", [lambda A: A, lambda A: A.T, lambda A: 2 * A.restrict([3, 0])])
def test_products_are_those_of_the_matrix(combine: Callable[[LinearOperator], LinearOperator]):
    J, _ = small()
    operator = combine(J)
    theirs, matrix = operator.to_scipy(), operator.matrix().numpy()
    rows, columns = theirs.shape
    assert theirs.dtype == np.float64
    generator = np.random.default_rng(0)
    v, V = generator.normal(size=columns), generator.normal(size=(columns, 3))
    u, U = generator.normal(size=rows), generator.normal(size=(rows, 3))
    for ours, dense in (
        (theirs @ v, matrix @ v),
        (theirs @ V, matrix @ V),
        (theirs.matvec(v[:, None]), (matrix @ v)[:, None]),
        (theirs.rmatvec(u), matrix.T @ u),
        (theirs.rmatmat(U), matrix.T @ U),
        (theirs.T @ u, matrix.T @ u),
        (theirs.H @ U, matrix.T @ U),
        ((theirs.T @ theirs) @ v, matrix.T @ (matrix @ v)),
        (theirs @ v[::-1], matrix @ v[::-1]),
    ):
        np.testing.assert_allclose(ours, dense, atol=1e-12)


def test_solvers_of_equations():
    entries = definite(6)
    target = normal(6).numpy()
    expected = np.linalg.solve(entries.numpy(), target)
    theirs = Dense(entries).to_scipy()
    for solve in (linalg.gmres, linalg.cg, linalg.minres, linalg.bicgstab):
        solved, told = solve(theirs, target, rtol=1e-12)
        assert told == 0
        np.testing.assert_allclose(solved, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "theirs"),
    [
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float16, np.float32),
    ],
)
def test_dtypes_are_those_that_scipy_knows(dtype: torch.dtype, theirs: Any):
    entries = normal(3, 4).to(dtype)
    operator = Dense(entries).to_scipy()
    assert operator.dtype == theirs
    product = operator @ np.ones(4, dtype=theirs)
    assert product.dtype == theirs
    np.testing.assert_allclose(product, entries.float().sum(1).numpy(), rtol=0.02, atol=0.02)


def test_products_are_taken_without_a_graph():
    _, J = linearize(lambda x: torch.tanh(x), normal(4).requires_grad_())
    theirs = J.to_scipy()
    fixed = np.ones(4)
    fixed.flags.writeable = False
    assert (theirs @ fixed).shape == (4,)
    assert theirs.rmatvec(fixed).shape == (4,)
