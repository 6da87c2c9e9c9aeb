"""Linear operators between trees: products with a vector, with many, and the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from jacfunc._solving import PRECISE, Solver, check_side
from jacfunc._types import Leaves
from jacfunc.operators._restriction import Choice, Which
from jacfunc.operators._solve import Solves
from jacfunc.operators._space import Space

Map: TypeAlias = Callable[[Leaves], Leaves]
"""Gives the products of K vectors, leaf by leaf."""


class LinearOperator(Solves):
    """A linear map ``v ↦ A v`` between two trees of tensors, and its transpose ``u ↦ Aᵀ u``.

    Vectors are trees, or flat tensors; a product has the form of the vector. ``A + B``, ``A - B``,
    ``2 * A``, ``A @ B``, ``A.T`` and :meth:`restrict` are operators of operators, which compute
    nothing until they are multiplied. A subclass says what its spaces are, and how K vectors are
    multiplied at once.

    Args:
        api: the name of the public function that made it, with which error messages begin.
        domain: where the vectors ``v`` are.
        codomain: where the products ``A v`` are.

    Raises:
        TypeError, ValueError: vectors, or operators, that do not fit.

    Example:
        An operator of your own, here the sum of all elements:

        >>> import torch
        >>> from jacfunc.operators import LinearOperator, Space
        >>> class Sum(LinearOperator):
        ...     def __init__(self, size):
        ...         super().__init__("Sum", Space.of(torch.ones(size)), Space.of(torch.ones(())))
        ...     def pushforward_batch(self, tangents):
        ...         return (tangents[0].sum(1),)
        ...     def pullback_batch(self, cotangents):
        ...         return (cotangents[0][:, None].expand(-1, self.domain.size),)
        >>> A = Sum(3)
        >>> A @ torch.tensor([1.0, 2.0, 3.0]), (2 * A).T @ torch.tensor(1.0)
        (tensor(6.), tensor([2., 2., 2.]))
        >>> A.matrix()
        tensor([[1., 1., 1.]])
    """

    def __matmul__(self, other: Any) -> Any:
        """The composition with an operator, or the product with one vector or a matrix."""
        if isinstance(other, LinearOperator):
            return self._after(other)
        return self.mm(other) if self.domain.is_matrix(other) else self.mv(other)

    def __rmatmul__(self, other: Any) -> Any:
        """``u A``, which is ``Aᵀ u``; of rows ``[K, M]``, ``[K, N]``."""
        if self.codomain.is_matrix(other, rows=True):
            return self.rmm(other.T).T
        return self.rmv(other)

    # --- operators of operators ---

    @property
    def T(self) -> LinearOperator:  # noqa: N802 (as in NumPy)
        """The transpose, ``u ↦ Aᵀ u``."""
        return OfMaps(
            *(self.api, self.codomain, self.domain, self.pullback_batch, self.pushforward_batch),
            self.is_symmetric,
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        self.domain.check_fits(self.api, other.domain)
        self.codomain.check_fits(self.api, other.codomain)

        def both(one: Map, two: Map) -> Map:
            return lambda seeds: tuple(map(torch.add, one(seeds), two(seeds)))

        return OfMaps(
            *(self.api, self.domain, self.codomain),
            both(self.pushforward_batch, other.pushforward_batch),
            both(self.pullback_batch, other.pullback_batch),
            self.is_symmetric and other.is_symmetric,
        )

    def __mul__(self, factor: float | Tensor) -> LinearOperator:
        if isinstance(factor, Tensor):
            is_scalar = factor.dim() == 0 and not factor.is_complex()
        else:
            is_scalar = isinstance(factor, Real)
        if not is_scalar:
            return NotImplemented
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other)

    def _after(self, other: LinearOperator) -> LinearOperator:
        """``A B``: this operator applied to products of another one."""
        self.domain.check_fits(self.api, other.codomain)
        return OfMaps(
            self.api,
            other.domain,
            self.codomain,
            lambda seeds: self.pushforward_batch(other.pushforward_batch(seeds)),
            lambda seeds: other.pullback_batch(self.pullback_batch(seeds)),
            is_symmetric=False,
        )

    def restrict(self, rows: Which = None, columns: Which = None) -> LinearOperator:
        """The operator of some rows and columns of the matrix, or of some leaves of the trees.

        Args:
            rows: which numbers of a product are wanted: patterns of names of leaves (``"2.*"``),
                which leave a dict of these by name, or a slice or the numbers of rows, which leave
                a flat tensor. None for all.
            columns: which numbers of a vector may differ from zero, in the same forms.

        Raises:
            TypeError, ValueError: names or numbers that are not there.

        Cost:
            Products as of the whole operator; a matrix of 5 rows takes 5 products with ``Aᵀ``.

        Example:
            >>> import torch, jacfunc
            >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0, 3.0]))
            >>> J.restrict(rows=[1], columns=slice(1, None)).matrix()
            tensor([[4., 0.]])
        """
        into = Choice.of(self.api, "columns", self.domain, columns)
        out = Choice.of(self.api, "rows", self.codomain, rows)
        return OfMaps(
            self.api,
            into.space,
            out.space,
            lambda seeds: out.extract(self.pushforward_batch(into.embed(seeds))),
            lambda seeds: into.extract(self.pullback_batch(out.embed(seeds))),
            is_symmetric=False,
        )

    def inverse(
        self,
        *,
        damping: float = 0.0,
        side: Literal["rows", "columns", "both"] = "both",
        center: bool = False,
        solver: Solver | None = None,
    ) -> LinearOperator:
        """What :meth:`solve` does as an operator: a matrix that it forms is factored once.

        Args:
            damping, center, solver: as in :meth:`solve`.
            side: ``"both"`` for ``(A + λ)⁻¹`` of a symmetric operator, ``"rows"`` for
                ``(A Aᵀ + λ)⁻¹``, ``"columns"`` for ``(Aᵀ A + λ)⁻¹``.

        Raises:
            TypeError, ValueError: as :meth:`solve`.

        Cost:
            As :meth:`solve`, at once; then two triangular solves a product, if it is factored.

        Example:
            >>> import torch, jacfunc
            >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
            >>> J.quad(J.inverse(damping=1.0, side="columns")).diagonal()
            tensor([0.8000, 0.9412])
        """
        check_side(self.api, side)
        space = self.codomain if side == "rows" else self.domain
        solution = self.solution(side, damping, center, solver)

        def solve(seeds: Leaves) -> Leaves:
            return space.cut(solution(space.rows(seeds).to(PRECISE)))

        return OfMaps(self.api, space, space, solve, solve, is_symmetric=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {self.dtype})"


class SymmetricOperator(LinearOperator):
    """An operator of a space into itself that is its own transpose.

    A subclass says what ``pushforward_batch`` is, and no more.
    """

    is_symmetric = True

    @property
    def T(self) -> Self:  # noqa: N802 (as in NumPy)
        """The operator itself."""
        return self

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        return self.pushforward_batch(cotangents)


class OfMaps(LinearOperator):
    """The operator of two functions of leaves: one for ``A v``, one for ``Aᵀ u``."""

    def __init__(
        self, api: str, domain: Space, codomain: Space, push: Map, pull: Map, is_symmetric: bool
    ) -> None:
        super().__init__(api, domain, codomain)
        self._push, self._pull, self.is_symmetric = push, pull, is_symmetric

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        return self._push(tangents)

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        return self._pull(cotangents)


class Scaled(LinearOperator):
    """An operator times a number; its Gramian is made as that of the operator itself."""

    def __init__(self, inner: LinearOperator, factor: complex | Tensor) -> None:
        super().__init__(inner.api, inner.domain, inner.codomain)
        self._inner, self._factor, self.is_symmetric = inner, factor, inner.is_symmetric

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        return tuple([self._factor * x for x in self._inner.pushforward_batch(tangents)])

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        return tuple([self._factor * x for x in self._inner.pullback_batch(cotangents)])

    def gram(self, *, center: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        return self._inner.gram(center=center, dtype=dtype) * self._factor**2

    def rows_of_samples(self, start: int, stop: int) -> Tensor:
        return self._inner.rows_of_samples(start, stop) * self._factor
