"""Stochastic Lanczos quadrature: the log-determinant of a positive definite matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._arguments import check_chunk_size
from jacfunc.estimators._approximation import (
    Approximation,
    ByProducts,
    Scatter,
    check_count,
    check_readable,
    check_seed,
    random_rows,
)
from jacfunc.estimators._lanczos import orthogonal

API = "StochasticLanczos"


@dataclass(frozen=True)
class StochasticLanczos:
    """The log-determinant as ``tr log A``: of sign vectors ω the mean of ``ωᵀ log(A) ω``.

    Each is Gauss's quadrature over the spectrum of A, with the nodes of Lanczos's tridiagonal
    matrix: exact once the Krylov space of ω is whole, and near it in few steps where eigenvalues
    are bounded away from zero, as by damping. The ``standard_error`` tells of the vectors alone,
    not of too few steps. A derivative of the estimate is the mean of ``ωᵀ A⁻¹ dA ω``, in the same
    Krylov spaces.

    Ubaru, Chen and Saad 2017, Algorithm 1, with all vectors kept orthogonal.

    Args:
        num_samples: vectors ω.
        num_steps: products for each; no more than A has rows are taken.
        seed: of the vectors; the same seed gives the same ones, whatever the device or the chunks.
        chunk_size: vectors that are multiplied at once; None for all.

    Raises:
        TypeError, ValueError: options that mean nothing. NotImplementedError: inside of vmap.

    Cost:
        ``num_samples · num_steps`` products; ``num_steps`` vectors for each of a chunk are kept.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import StochasticLanczos
        >>> from jacfunc.operators import logdet
        >>> A = torch.eye(50, dtype=torch.float64) * 2
        >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(50, dtype=torch.float64))
        >>> logdet(J, StochasticLanczos(4)).value  # 50 log 2
        tensor(34.6574, dtype=torch.float64)
    """

    num_samples: int = 10
    num_steps: int = 30
    seed: int = 0
    chunk_size: int | None = 8

    def __post_init__(self) -> None:
        check_count(API, "num_samples", self.num_samples, 2)
        check_count(API, "num_steps", self.num_steps, 2)
        check_seed(API, self.seed)
        check_chunk_size(API, self.chunk_size)

    def estimate_logdet(self, matrix: ByProducts, damping: float) -> Approximation:
        """The log-determinant of the matrix and the damping on its diagonal."""
        scatter = Scatter()
        args = matrix, self.num_samples, self.seed, self.chunk_size
        for vectors in random_rows(*args, signs=True):
            scatter.add(self._logarithms(matrix, vectors, damping))
        return scatter.result()

    def _logarithms(self, matrix: ByProducts, vectors: Tensor, damping: float) -> Tensor:
        """``ωᵀ log(A + damping) ω`` of K vectors in rows."""
        length = matrix.shape[1] ** 0.5
        first = matrix.push(vectors / length)
        check_readable(matrix, first)
        basis, projected = self._krylov(matrix, vectors / length, first.detach())
        _check_symmetric(matrix, projected)
        nodes, modes = torch.linalg.eigh(projected)
        nodes = nodes + damping
        _check_definite(matrix, nodes)
        heads = modes[:, 0]
        logarithms = (heads.square() * nodes.log()).sum(1)
        # the derivative is that of the products with (A + damping)⁻¹ ω, which the space has, too
        solved = (modes @ (heads / nodes)[..., None]).mT @ basis
        slope = (solved[:, 0] * first).sum(1)
        every: Tensor = logarithms + slope - slope.detach()
        return every * matrix.shape[1]

    def _krylov(self, matrix: ByProducts, start: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal vectors ``[K, S, N]`` of Krylov spaces, and A in them, ``[K, S, S]``.

        A space that ends before has zeros for vectors, of which A is a number within the spectrum.
        """
        steps, vectors, columns = min(self.num_steps, matrix.shape[1]), [start], []
        for step in range(steps):
            basis = torch.stack(vectors, 1)
            unit, inside, size = orthogonal(product, basis, matrix.rounding)
            columns.append(F.pad(torch.cat([inside, size[:, None]], 1), (0, steps - step - 1)))
            if step + 1 < steps:
                vectors.append(unit)
                product = matrix.push(unit).detach()
        projected = torch.stack(columns, 2)[:, :steps]
        has_ended = (basis == 0).all(2)
        return basis, projected + torch.diag_embed(has_ended * projected[:, :1, 0])


def _check_symmetric(matrix: ByProducts, projected: Tensor) -> None:
    """Refuse a matrix that is not symmetric in the spaces where it was seen."""
    sizes = projected.abs().amax((1, 2))
    differences = (projected - projected.mT).abs().amax((1, 2))
    if (differences > matrix.rounding**0.5 * sizes).any():
        raise ValueError(
            f"{matrix.api}: the operator must be symmetric for StochasticLanczos, got one whose "
            f"products differ by {float((differences / sizes).max()):.2g} of their size. Take half "
            "that of A.T @ A for log|det A|, or the exact one."
        )


def _check_definite(matrix: ByProducts, nodes: Tensor) -> None:
    """Refuse eigenvalues that are not positive beyond rounding."""
    least, largest = float(nodes.min()), float(nodes.max())
    if not least > matrix.rounding * largest:
        raise ValueError(
            f"{matrix.api}: the operator must be positive definite for StochasticLanczos, got "
            f"eigenvalues from {least:.2g} to {largest:.2g}. Add damping, or take the exact one."
        )
