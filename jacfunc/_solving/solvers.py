"""Symmetric systems ``(A + λ) x = b``: by a Cholesky factor of the matrix, or by products alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from jacfunc._linear_map import LinearMap, is_followed
from jacfunc._torch import (
    below_transforms,
    inside_transform,
    is_batched,
    is_tracked,
    is_undisturbed,
    outside_transforms,
)
from jacfunc._types import Leaves, RowMap

PRECISE = torch.float64
"""Systems are solved in this dtype; of an operator in float32 only its products are rounded."""

IN_BYTES = 3 * 8
"""Bytes that a factorization takes for each entry: the matrix and its factor, and work on them."""


@dataclass(frozen=True)
class System:
    """The equations ``(A + λ) x = b`` with a symmetric A that has no negative eigenvalue.

    Args:
        api: the name of the public function, with which error messages begin.
        size: how many equations there are.
        dtype: in which products are computed.
        times: ``A x`` of K vectors in rows, ``[K, size]``, in float64.
        formed: makes A in float64, as a tensor that is written into.
        damping: the number λ.
        noise: what rounding may add to eigenvalues of A, as a part of the largest.
    """

    api: str
    size: int
    dtype: torch.dtype
    times: RowMap
    formed: Callable[[], Tensor]
    damping: float
    noise: float


class Solver(ABC):
    """Solves ``(A + λ) x = b``."""

    forms: ClassVar[bool]
    """Does it form A? Then the smaller of ``J Jᵀ`` and ``Jᵀ J`` is taken."""

    @abstractmethod
    def prepared(self, system: System) -> RowMap:
        """What makes solutions of K right-hand sides, ``[K, size]`` in float64."""


@dataclass(frozen=True)
class Cholesky(Solver):
    """Forms the matrix in float64, and factors it once for all right-hand sides.

    Raises:
        ValueError: from a solve, if the matrix plus damping is not positive definite beyond what
            rounding changes.

    Cost:
        For n equations the matrix, ``n³ / 3`` multiplications, and about 24 n² bytes.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.operators import Cholesky
        >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> J.solve(torch.ones(2), damping=1.0, side="rows", solver=Cholesky())
        tensor([0.2000, 0.0588])
    """

    forms: ClassVar[bool] = True

    def prepared(self, system: System) -> RowMap:
        matrix = system.formed()
        matrix.diagonal().add_(system.damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if system.size:
            pivots = factor.detach().diagonal()
            self._check(system, torch.where(failed > 0, 0.0, pivots.amin() / pivots.amax()))
        return lambda rows: torch.cholesky_solve(rows.T, factor).T

    @staticmethod
    def _check(system: System, share: Tensor) -> None:
        """Refuse a least pivot that rounding may have made, as a share of the largest one."""
        # a vmap may solve for many matrices
        with nullcontext() if is_undisturbed() else outside_transforms():
            squared = float(below_transforms(share).detach().min()) ** 2
        if not squared > system.noise:  # a nan fails every comparison
            raise ValueError(
                f"{system.api}: the matrix plus damping must be positive definite beyond what "
                f"rounding changes, got a pivot of {squared:.1e} of the largest with "
                f"damping={system.damping:g}. Give a larger damping, float64, or finite numbers."
            )


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Takes products alone, and forms no matrix.

    A solution whose residual does not become small is an error: the residual is computed anew from
    the solution, as the one that steps update may be far from it in float32.

    Args:
        rtol: how small the residual must be beside the right-hand side; None for the square root of
            the precision, 3.5e-4 in float32.
        maxiter: products at most; None for ten times as many as there are equations, and at least
            100.

    Raises:
        ValueError: options that mean nothing; from a solve, if the matrix is not positive definite.
        RuntimeError: from a solve, if it does not converge.
        NotImplementedError: from a solve, if the operator is differentiated or vmapped.

    Cost:
        A product with A a step, for all right-hand sides at once, and a few vectors for each.

    Source: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.operators import ConjugateGradient
        >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> J.solve(torch.ones(2), damping=1.0, side="rows", solver=ConjugateGradient(rtol=1e-6))
        tensor([0.2000, 0.0588])
    """

    rtol: float | None = None
    maxiter: int | None = None

    forms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rtol, maxiter = self.rtol, self.maxiter
        if rtol is not None and not (isinstance(rtol, float) and 0 < rtol < 1):
            raise ValueError(
                f"ConjugateGradient: rtol must be a number between 0 and 1, got {rtol!r}. "
                "Write 1e-5, or leave it out."
            )
        is_number = isinstance(maxiter, int) and not isinstance(maxiter, bool) and maxiter > 0
        if maxiter is not None and not is_number:
            raise ValueError(
                f"ConjugateGradient: maxiter must be a positive number of products, got "
                f"{maxiter!r}. Write 100, or leave it out."
            )

    def prepared(self, system: System) -> RowMap:
        def solved(rows: Tensor) -> Tensor:
            if torch.is_grad_enabled() or inside_transform():
                ones = torch.ones(1, system.size, dtype=rows.dtype, device=rows.device)
                self._check(system, system.times(ones))
            if is_followed((rows,)):
                return self._as_map(system)((rows,))[0]
            with torch.no_grad():
                return self._solved(system, rows)

        return solved

    @staticmethod
    def _check(system: System, product: Tensor) -> None:
        """Refuse an operator that a transform, or autograd, follows."""
        if is_tracked(product) or is_batched(product):
            raise NotImplementedError(
                f"{system.api}: an operator that is solved with by iterations must be constant, "
                "got one that is differentiated or vmapped. Use solver=Cholesky(), or "
                "torch.no_grad()."
            )

    def _as_map(self, system: System) -> LinearMap:
        """The solution as a map that is differentiable by the right-hand sides."""

        def solutions(seeds: Leaves) -> Leaves:
            return (self._solved(system, seeds[0]),)

        return LinearMap.of_batches(solutions, lambda: self._as_map(system))

    def _solved(self, system: System, rows: Tensor) -> Tensor:
        rtol = self.rtol or sqrt(torch.finfo(system.dtype).eps)
        left = self.maxiter or max(100, 10 * system.size)
        bounds = rtol * rows.norm(dim=1)
        solutions, residuals = torch.zeros_like(rows), rows
        worst = float("inf")
        while True:
            norms = residuals.norm(dim=1)
            if bool((norms <= bounds).all()):
                return solutions
            shares = torch.where(bounds > 0, norms * rtol / bounds, norms)
            before, worst = worst, float(shares.max())
            # each pass must gain something, or rounding is all that is left
            if left < 1 or not worst < before / 2:
                raise RuntimeError(
                    f"{system.api}: the residual must fall to {rtol:.1e} of b, got {worst:.1e} "
                    f"when {'products ran out' if left < 1 else 'it fell no more'}. Give a larger "
                    "damping, maxiter or rtol, float64, or solver=Cholesky()."
                )
            steps, left = _steps(system, residuals, bounds / 2, left)
            solutions = solutions + steps
            residuals = rows - system.times(solutions) - system.damping * solutions


def _steps(system: System, rows: Tensor, bounds: Tensor, most: int) -> tuple[Tensor, int]:
    """What conjugate gradients add to the solutions, and how many products are left."""
    solutions, residuals, directions = torch.zeros_like(rows), rows, rows
    squares = residuals.square().sum(1)
    while most and bool((squares > bounds.square()).any()):
        images = system.times(directions) + system.damping * directions
        curvatures = (directions * images).sum(1)
        is_open = squares > bounds.square()
        if bool((is_open & (curvatures <= 0)).any()):
            raise ValueError(
                f"{system.api}: the matrix plus damping must be positive definite, got a direction "
                f"with curvature {float(curvatures.min()):.1e}. Give a larger damping."
            )
        lengths = torch.where(is_open, squares / curvatures, 0.0)[:, None]
        solutions = solutions + lengths * directions
        residuals = residuals - lengths * images
        former, squares = squares, residuals.square().sum(1)
        shares = torch.where(is_open, squares / former, 0.0)[:, None]
        directions = residuals + shares * directions
        most -= 1
    return solutions, most
