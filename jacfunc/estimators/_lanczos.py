"""The largest singular value, by the bidiagonalization of Golub, Kahan and Lanczos."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacfunc.estimators._approximation import (
    Approximation,
    ByProducts,
    check_count,
    check_readable,
    check_seed,
    random_rows,
)

API = "Lanczos"


@dataclass(frozen=True)
class Lanczos:
    """The spectral norm, from the Krylov spaces of ``Aᵀ A`` and a random vector.

    The value is a lower bound, which converges as fast as the largest singular value stands out.
    Its ``standard_error`` is no statistic but a bound: some singular value lies as near.

    Golub and Kahan 1965, with all vectors kept orthogonal; its derivative is that of ``uᵀ A v`` for
    the singular vectors u and v.

    Args:
        num_steps: at most so many steps.
        tolerance: the error, relative to the value, at which it ends.
        seed: of the first vector.

    Raises:
        TypeError, ValueError: options that mean nothing. NotImplementedError: inside of vmap.

    Cost:
        A product with A and one with Aᵀ a step, and their vectors, which are kept.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import Lanczos
        >>> from jacfunc.operators import spectral_norm
        >>> A = torch.diag(torch.arange(100.0, dtype=torch.float64))
        >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(100, dtype=torch.float64))
        >>> spectral_norm(J, Lanczos(50, tolerance=1e-8)).value
        tensor(99.0000, dtype=torch.float64)
    """

    num_steps: int = 100
    tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(API, "num_steps", self.num_steps, 1)
        check_seed(API, self.seed)
        is_number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not is_number or not 0 <= self.tolerance < 1:
            raise ValueError(
                f"{API}: tolerance must be a number from 0 to 1, got {self.tolerance!r}. It is the "
                "relative error at which the iteration ends."
            )

    def estimate_spectral_norm(self, matrix: ByProducts) -> Approximation:
        """The largest singular value of the bidiagonal matrix, with its residual."""
        if matrix.shape[0] < matrix.shape[1]:  # the spaces end in the smaller side
            shape = matrix.shape[::-1]
            matrix = replace(matrix, shape=shape, push=matrix.pull, pull=matrix.push)
        u, v, residual = self._singular_vectors(matrix)
        value = (u * matrix.push(v[None])[0]).sum()
        return Approximation(value, residual)

    def _singular_vectors(self, matrix: ByProducts) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right vectors of the largest value, and how far they are from solving it."""
        (first,) = random_rows(matrix, 1, self.seed, None, signs=False)
        right, left = first / first.norm(), first.new_zeros(0, matrix.shape[0])
        bidiagonal = first.new_zeros(0, 0)
        while True:
            count = len(right)
            pushed = matrix.push(right[-1:]).detach()[0]
            check_readable(matrix, pushed)
            pushed, above, size = orthogonal(pushed, left, matrix.rounding)
            left = torch.cat([left, pushed[None]])
            bidiagonal = torch.cat([bidiagonal, bidiagonal.new_zeros(1, count - 1)])
            bidiagonal = torch.cat([bidiagonal, torch.cat([above, size[None]])[:, None]], 1)
            pulled = matrix.pull(left[-1:]).detach()[0]
            pulled, _, size = orthogonal(pulled, right, matrix.rounding)
            U, values, V = torch.linalg.svd(bidiagonal)
            residual = size * U[-1, 0].abs()
            if residual <= self.tolerance * values[0] or count == min(
                self.num_steps, *matrix.shape
            ):
                return U[:, 0] @ left, V[0] @ right, residual
            right = torch.cat([right, pulled[None]])


def orthogonal(vector: Tensor, basis: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """The part of vectors ``[*B, N]`` that is orthogonal to rows ``[*B, S, N]``, of length one.

    Twice is enough: Giraud, Langou and Rozložník 2005. What rounding alone has left is zero.

    Returns:
        It, the coordinates ``[*B, S]`` of the other part, and its length before, ``[*B]``.
    """
    inside = (basis @ vector[..., None])[..., 0]
    rest = vector - (inside[..., None, :] @ basis)[..., 0, :]
    again = (basis @ rest[..., None])[..., 0]
    rest = rest - (again[..., None, :] @ basis)[..., 0, :]
    size = torch.linalg.vector_norm(rest, dim=-1)
    is_left = size > 10 * rounding * torch.linalg.vector_norm(vector, dim=-1)
    unit = torch.where(is_left[..., None], rest / size[..., None], 0.0)
    return unit, inside + again, torch.where(is_left, size, 0.0)
