"""The normal equations of a linear map: ``(A Aᵀ + λ) u = b`` on one side, ``(Aᵀ A + λ) v = b``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from jacfunc._log import note
from jacfunc._memory import MODEST_BYTES, free_bytes
from jacfunc._solving.solvers import (
    IN_BYTES,
    PRECISE,
    Cholesky,
    ConjugateGradient,
    Solver,
    System,
)
from jacfunc._types import RowMap


class Formed(Protocol):
    """Makes a matrix in a dtype."""

    def __call__(self, *, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        ...


MANY, SOME_BYTES = 256, 2**26
"""Unit vectors that are multiplied at once, and bytes of a matrix that are made precise at once."""


@dataclass(frozen=True, eq=False)
class OneSide:
    """One side of a linear map: its vectors go across to the other side, and back.

    Args:
        api: the name of the public function, with which error messages begin.
        sizes: numbers of a vector on this side, and on the other one.
        dtype, device: of products.
        across, back: to the other side and back, each the transpose of the other.
        whole: makes the map from the other side to this one as a matrix.
        formed: makes ``back(across(·))`` as a matrix in a dtype, if there is a way of its own.
        room: bytes that a matrix may take; by default half of what is free.
    """

    api: str
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, int]
    across: RowMap
    back: RowMap
    whole: Callable[[], Tensor]
    formed: Formed | None = None
    room: int | None = None

    @property
    def is_smaller(self) -> bool:
        """Has the other side as many numbers, or more?"""
        return self.sizes[0] <= self.sizes[1]

    def gram(self, dtype: torch.dtype) -> Tensor:
        """``back(across(·))`` as a matrix: from the whole map if that fits into memory."""
        if self._can_be_whole:
            return squared(self.whole(), dtype)
        total = torch.cat([self.back(self.across(units)).to(dtype) for units in self._units()])
        return (total + total.T) / 2

    def quad(self, times: RowMap) -> Tensor:
        """``A S Aᵀ`` of the map A to this side, with S on the other side."""
        if self._can_be_whole:
            matrix = self.whole()
            return matrix @ times(matrix).T
        columns = [self.back(times(self.across(units))) for units in self._units()]
        return torch.cat(columns).T

    @property
    def _can_be_whole(self) -> bool:
        """Does the map fit into memory as a matrix, with the work on it?"""
        own, other = self.sizes
        return self._fits(3 * own * other * self.dtype.itemsize)

    def _fits(self, nbytes: int) -> bool:
        if self.room is not None:
            return nbytes <= self.room
        return nbytes <= MODEST_BYTES or nbytes <= free_bytes(self.device) // 2

    def _usual(self, size: int) -> Solver:
        """Who solves so many equations: Cholesky where the matrix and its factor fit."""
        if self._fits(IN_BYTES * size**2):
            return Cholesky()
        note("a matrix of %d rows does not fit into memory: conjugate gradients", size)
        return ConjugateGradient()

    def _units(self) -> Iterator[Tensor]:
        """Unit vectors of this side, some at a time."""
        (own, other), size = self.sizes, self.dtype.itemsize
        step = max(1, min(MANY, SOME_BYTES // max(1, max(own, other) * size)))
        for start in range(0, own, step):
            units = torch.zeros(min(step, own - start), own, dtype=self.dtype, device=self.device)
            units.diagonal(start).fill_(1)
            yield units

    def system(self, damping: float) -> System:
        """The equations ``back(across(x)) + λ x = b``."""
        formed = partial(self.formed or self.gram, dtype=PRECISE)
        # the map errs by the precision; its square is computed in float64, and errs by the square
        noise = (8 * torch.finfo(self.dtype).eps) ** 2
        return self._system(lambda rows: self.back(self.across(rows)), formed, damping, noise)

    def _system(
        self, times: RowMap, formed: Callable[[], Tensor], damping: float, noise: float
    ) -> System:
        def precise(rows: Tensor) -> Tensor:
            return times(rows).to(rows.dtype)

        size = self.sizes[0]
        noise = max(size * torch.finfo(PRECISE).eps, noise)
        return System(self.api, size, self.dtype, precise, formed, float(damping), noise)

    def itself(
        self, matrix: Callable[[], Tensor], damping: float, solver: Solver | None, is_known: bool
    ) -> RowMap:
        """Makes solutions of ``(A + λ) x = b`` with a square A, by ``back`` from one side.

        Args:
            is_known: is it known that A is symmetric?

        Raises:
            ValueError: unless A is symmetric.
        """
        eps, size = torch.finfo(self.dtype).eps, self.sizes[0]
        if not is_known:
            trial = torch.arange(size, dtype=self.dtype, device=self.device).cos()[None]
            with torch.no_grad():
                pushed, pulled = self.back(trial), self.across(trial)
            if not (pushed - pulled).norm() <= (pushed + pulled).norm() * eps**0.4:
                raise ValueError(
                    f"{self.api}: side='both' takes a symmetric matrix, got one whose A v is not "
                    "Aᵀ v. Say 'rows' or 'columns'."
                )

        def formed() -> Tensor:
            whole = matrix().to(PRECISE)
            return (whole + whole.T) / 2

        solver = solver or self._usual(size)
        return solver.prepared(self._system(self.back, formed, damping, 4 * eps))

    def solution(self, other: OneSide, damping: float, solver: Solver | None) -> RowMap:
        """Makes solutions on this side; a matrix is formed for the smaller side."""
        smaller = self if self.is_smaller else other
        solver = solver or self._usual(smaller.sizes[0])
        if smaller is self or not solver.forms:
            return solver.prepared(self.system(damping))
        if not damping:
            raise ValueError(
                f"{self.api}: damping must be positive where b has more numbers than the other "
                f"side, got {self.sizes[0]} and {self.sizes[1]}: the matrix is singular. Give "
                "damping, or take lstsq, which needs none."
            )
        within = solver.prepared(smaller.system(damping))

        def solved(rows: Tensor) -> Tensor:
            inner = self.back(within(self.across(rows).to(rows.dtype)))
            return (rows - inner.to(rows.dtype)) / damping

        return solved


def squared(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``A Aᵀ`` of a matrix, added up in a dtype."""
    step = max(1, SOME_BYTES // max(1, len(matrix) * dtype.itemsize))
    total = matrix.new_zeros(len(matrix), len(matrix), dtype=dtype)
    for part in matrix.split(step, 1):
        precise = part.to(dtype)
        total = total + precise @ precise.T
    return total
