"""Solves with a linear operator: ``(A Aᵀ + λ)⁻¹ b``, ``(Aᵀ A + λ)⁻¹ b``, and ``A S Aᵀ``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_flags
from jacfunc._solving import (
    PRECISE,
    SOME_BYTES,
    OneSide,
    Side,
    Solver,
    check_gram,
    check_options,
    side_of,
)
from jacfunc._types import Leaves, RowMap, Tree
from jacfunc.operators._products import Products


class Solves(Products):
    """A linear map with solves of its normal equations, on whichever side is smaller."""

    is_symmetric: bool = False
    """Is the matrix known to be symmetric? Then :meth:`solve` is of the matrix itself."""

    def gram(self, *, center: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """``A Aᵀ``, ``[M, M]``.

        Args:
            center: subtract from rows of A their mean over samples, products' first dimension. Done
                before they are multiplied, as float32 would lose what is left.
            dtype: in which products are added up, and of the result; by default the operator's.

        Raises:
            ValueError: products without samples, if they are to be centred.

        Cost:
            The matrix A if that fits into memory, else M products with Aᵀ and with A. Of a module
            at independent samples it comes from the factors of layers.

        Example:
            >>> import torch, jacfunc
            >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
            >>> J.gram()
            tensor([[ 4.,  0.],
                    [ 0., 16.]])
        """
        check_gram(self.api, center, dtype)
        return self._side("rows", center).gram(dtype or self.dtype)

    def solve(
        self,
        b: Tree,
        *,
        damping: float = 0.0,
        side: Side = "auto",
        center: bool = False,
        solver: Solver | None = None,
    ) -> Any:
        """``(A Aᵀ + λ)⁻¹ b`` or ``(Aᵀ A + λ)⁻¹ b``; of a symmetric operator ``(A + λ)⁻¹ b``.

        The matrix of the smaller side is taken: ``(Aᵀ A + λ)⁻¹ = (I - Aᵀ (A Aᵀ + λ)⁻¹ A) / λ``.

        Args:
            b: a tree, or a flat tensor; K of them are a matrix with K columns.
            damping: the number λ ≥ 0.
            side: ``"rows"`` for a b like products, and ``A Aᵀ``; ``"columns"`` for one like
                vectors, and ``Aᵀ A``; ``"both"`` for ``(A + λ)⁻¹ b`` with a symmetric A. By default
                what the form of b says, and both if the operator says that it is symmetric.
            center: subtract from rows of A their mean over samples, as in :meth:`gram`.
            solver: ``Cholesky()`` or ``ConjugateGradient()`` of :mod:`jacfunc.operators`; by
                default the first if its matrix fits into memory.

        Returns:
            The solution, in the form of b. It can be differentiated by b; and by what the operator
            depends on, where its products can, with ``Cholesky()``.

        Raises:
            TypeError, ValueError: arguments that do not fit; a b that may belong to either side; a
                matrix that is not positive definite. RuntimeError: iterations that do not converge.

        Cost:
            With Cholesky one :meth:`gram`, in float64, and ``n³ / 3`` multiplications for its n
            rows; two products more if b belongs to the larger side. That loses digits where λ is
            small beside A: for ``(Aᵀ A + λ)⁻¹ Aᵀ r`` take :meth:`lstsq`.

        Example:
            >>> import torch, jacfunc
            >>> value, J = jacfunc.linearize(lambda x: x[:1] * x[1:], torch.tensor([1.0, 2.0, 3.0]))
            >>> J.solve(torch.tensor([1.0, 0.0]), damping=1.0)
            tensor([ 0.3667, -0.2000])
            >>> J.solve(torch.tensor([1.0, 0.0, 0.0]), damping=1.0)
            tensor([ 0.1333, -0.1333, -0.2000])
        """
        own = side_of(self.api, self.codomain, self.domain, side, b, self.is_symmetric)
        space = self.codomain if own == "rows" else self.domain
        leaves, write = space.read_any(self.api, "b", b)
        rows = self.solution(own, damping, center, solver)(space.rows(leaves).to(PRECISE))
        return write(space, space.cut(rows))

    def solution(self, side: Side, damping: float, center: bool, solver: Solver | None) -> RowMap:
        """Makes solutions of flat right-hand sides, ``[K, size]`` in float64."""
        check_options(self.api, side, damping, center, solver)
        if side == "both":
            self.domain.check_fits(self.api, self.codomain)
            known = self.is_symmetric
            return self._side("rows", False).itself(self.matrix, damping, solver, known)
        other = self._side("columns" if side == "rows" else "rows", center)
        return self._side(side, center).solution(other, damping, solver)

    def lstsq(
        self, b: Tree, *, damping: float = 0.0, center: bool = False, solver: Solver | None = None
    ) -> Any:
        """``Aᵀ (A Aᵀ + λ)⁻¹ b = (Aᵀ A + λ)⁻¹ Aᵀ b``, which minimizes ``‖A x - b‖² + λ‖x‖²``.

        A step of Gauss and Newton, of Levenberg and Marquardt, of natural gradients; with
        ``center=True`` of stochastic reconfiguration (minSR). Without damping it is the solution of
        least squares, or of least norm.

        Args:
            b: like products: a tree, or a flat tensor; K of them are a matrix with K columns.
            damping, center, solver: as in :meth:`solve`.

        Returns:
            ``x`` like vectors, in the form of b.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`solve`.

        Cost:
            As :meth:`solve` on the smaller side, and one product with Aᵀ.

        Source:
            Chen, Heyl, "Empowering deep neural quantum states through efficient optimization"
            (Nature Physics 2024), for minSR.

        Example:
            >>> import torch, jacfunc
            >>> A, b = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), torch.tensor([1.0, 2, 2])
            >>> residual, J = jacfunc.linearize(lambda x: A @ x, torch.zeros(2))
            >>> J.lstsq(b)
            tensor([0.6667, 0.5000])
        """
        check_options(self.api, "rows", damping, center, solver)
        leaves, write = self.codomain.read_any(self.api, "b", b)
        one, other = self._side("rows", center), self._side("columns", center)
        rows = self.codomain.rows(leaves).to(PRECISE)
        if one.is_smaller:  # products are written as they come, never as one row
            rows = one.solution(other, damping, solver)(rows)
            rows = self.codomain.centring(self.api, center)(rows)
            return write(self.domain, self.pullback_batch(self.codomain.cut(rows)))
        solution = other.solution(one, damping, solver)
        return write(self.domain, self.domain.cut(solution(one.across(rows).to(PRECISE))))

    def quad(self, middle: Any, *, per_sample: bool = False) -> Tensor:
        """``A S Aᵀ``, ``[M, M]``: covariances of products whose vectors have the covariance S.

        Args:
            middle: the matrix S: its diagonal, as a tree like vectors or a flat tensor ``[N]``; a
                tensor ``[N, N]``; or an operator between vectors.
            per_sample: only what has both sides in one sample, by the first dimension of products:
                ``[B, C, C]`` for C numbers a sample.

        Raises:
            TypeError, ValueError: a matrix that does not fit.

        Cost:
            M products with Aᵀ and with S, and M with A if A does not fit into memory. Of each
            sample of a module, with a diagonal S, it comes from the factors of layers.

        Example:
            >>> import torch, jacfunc
            >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
            >>> J.quad(torch.tensor([0.5, 0.25]))
            tensor([[2., 0.],
                    [0., 4.]])
            >>> J.quad(torch.eye(2), per_sample=True).flatten()
            tensor([ 4., 16.])
        """
        check_flags(self.api, per_sample=per_sample)
        times = self._times(middle)
        if not per_sample:
            return self._side("rows", False).quad(times)
        count = self.codomain.samples(self.api)
        width = self.codomain.size // max(1, count)
        blocks = [torch.zeros(0, width, width, dtype=self.dtype, device=self.device)]
        step = max(1, SOME_BYTES // max(1, width * self.domain.size * self.dtype.itemsize))
        for start in range(0, count, step):
            rows = self.rows_of_samples(start, min(start + step, count))
            blocks.append(rows @ times(rows.flatten(0, 1)).view(rows.shape).mT)
        return torch.cat(blocks)

    def rows_of_samples(self, start: int, stop: int) -> Tensor:
        """Rows of A that belong to some samples, ``[B, C, N]``: by products with Aᵀ."""
        leaves, device = self.codomain.leaves, self.device
        every = torch.arange(self.codomain.size, device=device).split([x.numel() for x in leaves])
        by_sample = [numbers.view(len(leaves[0]), -1)[start:stop] for numbers in every]
        units = torch.cat(by_sample, 1)
        shape = (units.numel(), self.codomain.size)
        seeds = torch.zeros(shape, dtype=self.codomain.dtype, device=device)
        seeds.scatter_(1, units.view(-1, 1), 1)
        return self._side("rows", False).across(seeds).view(*units.shape, self.domain.size)

    def diagonal_of(self, middle: Any) -> Leaves | None:
        """The diagonal matrix S as leaves like vectors; None if S is not said by its diagonal."""
        is_matrix = isinstance(middle, Tensor) and middle.shape == (self.domain.size,) * 2
        if isinstance(middle, Products) or (is_matrix and not self.domain.is_leaf(middle)):
            return None
        leaves, _ = self.domain.read(self.api, "middle", middle)
        return tuple(leaf[0] for leaf in leaves)

    def _times(self, middle: Any) -> RowMap:
        """The product with S, of K vectors in rows."""
        domain, leaves = self.domain, self.diagonal_of(middle)
        if leaves is not None:
            diagonal = domain.rows(tuple(leaf[None] for leaf in leaves))
            return lambda rows: rows * diagonal
        if isinstance(middle, Products):
            domain.check_fits(self.api, middle.domain)
            domain.check_fits(self.api, middle.codomain)
            return lambda rows: domain.rows(middle.pushforward_batch(domain.cut(rows)))
        domain.read_many(self.api, "middle", middle)
        return lambda rows: rows @ middle.T

    def _side(self, side: Side, center: bool) -> OneSide:
        """One side of the matrix, on flat vectors."""
        domain, codomain = self.domain, self.codomain
        centred = codomain.centring(self.api, center)

        def push(rows: Tensor) -> Tensor:
            return centred(codomain.rows(self.pushforward_batch(domain.cut(rows))))

        def pull(rows: Tensor) -> Tensor:
            return domain.rows(self.pullback_batch(codomain.cut(centred(rows))))

        def columns() -> Tensor:
            return centred(self.matrix().T)

        kind, sizes = (self.api, self.dtype, self.device), (codomain.size, domain.size)
        if side == "rows":
            gram = partial(self.gram, center=center)
            return OneSide(*kind, sizes, pull, push, lambda: columns().T, gram)
        return OneSide(*kind, sizes[::-1], push, pull, columns, None)
