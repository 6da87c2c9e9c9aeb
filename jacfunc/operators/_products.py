"""Products of a linear map between two trees; its matrix, and what else is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import NEW_TENSORS, Grid, Sink, Sweep, sink_for, sweep, sweep_leaves
from jacfunc._errors import Refused
from jacfunc._linear_map import check_numbers
from jacfunc._log import note
from jacfunc._memory import Chunk
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc.estimators import ByProducts
from jacfunc.operators._scipy import BesideArrays, scipy_operator
from jacfunc.operators._space import Space, on_rows

MANY = 256
"""Seeds that are swept at once, where a whole matrix is asked for."""


class Products(BesideArrays, ABC):
    """A linear map ``v ↦ A v`` between two trees of tensors, and its transpose ``u ↦ Aᵀ u``.

    Args:
        api: the name of the public function that made it, with which error messages begin.
        domain: where the vectors ``v`` are.
        codomain: where the products ``A v`` are.
    """

    def __init__(self, api: str, domain: Space, codomain: Space) -> None:
        self.api, self.domain, self.codomain = api, domain, codomain

    @abstractmethod
    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        """``A v`` of K vectors, leaf by leaf: ``[K, *in_j]`` → ``[K, *out_i]``."""

    @abstractmethod
    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        """``Aᵀ u`` of K vectors, leaf by leaf: ``[K, *out_i]`` → ``[K, *in_j]``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, N)``: the numbers of a product, and of a vector."""
        return self.codomain.size, self.domain.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return torch.promote_types(self.domain.dtype, self.codomain.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.domain.device

    # --- products ---

    def mv(self, vector: Tree) -> Any:
        """``A v`` of one vector: a tree like the domain gives one like the codomain.

        Raises:
            TypeError, ValueError: a vector that does not fit. NotImplementedError: what torch
                refuses.
        """
        leaves, write = self.domain.read(self.api, "vector", vector)
        return write(self.codomain, self.pushforward_batch(leaves))

    def rmv(self, vector: Tree) -> Any:
        """``Aᵀ u`` of one vector: a tree like the codomain gives one like the domain."""
        leaves, write = self.codomain.read(self.api, "vector", vector)
        return write(self.domain, self.pullback_batch(leaves))

    def mm(self, vectors: Tree) -> Any:
        """``A V`` of K vectors: ``[N, K]`` → ``[M, K]``, or trees with K in front of each leaf."""
        leaves, write = self.domain.read_many(self.api, "vectors", vectors)
        return write(self.codomain, self.pushforward_batch(leaves))

    def rmm(self, vectors: Tree) -> Any:
        """``Aᵀ U`` of K vectors: ``[M, K]`` → ``[N, K]``, or trees with K in front of each leaf."""
        leaves, write = self.codomain.read_many(self.api, "vectors", vectors)
        return write(self.domain, self.pullback_batch(leaves))

    def matrix(self, *, chunk_size: int | None = MANY) -> Tensor:
        """The matrix ``[M, N]``, by products with the unit vectors of its smaller side.

        Args:
            chunk_size: unit vectors that are multiplied at once; None for all.

        Cost:
            ``min(M, N)`` products, and memory of the result and one chunk of products.
        """
        sink = sink_for(self.api, None, flat=True)
        blocks = self.into(sink, chunk_size)
        ((matrix,),) = sink.finished(blocks, Grid.of(self.codomain.leaves, self.domain.leaves), ())
        return matrix

    def tree(self, *, chunk_size: int | None = MANY) -> Any:
        """The matrix as a tree like the codomain, of trees like the domain, of blocks.

        Returns:
            Blocks ``[*out_i, *in_j]``, as :func:`jacfunc.jacobian` returns them.
        """
        blocks = self.into(NEW_TENSORS, chunk_size)
        return self.codomain.split.place([self.domain.split.place(row) for row in blocks])

    def diagonal(self) -> Any:
        """The diagonal of a square matrix, as a tree like the domain, by a row at each number.

        Raises:
            ValueError: an operator that is not square.

        Cost:
            N products with ``Aᵀ``, and memory of one chunk of rows.
        """
        if self.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self.api}: the operator must be square to have a diagonal, got "
                f"{self.shape[0]} × {self.shape[1]}. Restrict it, or take that of A.T @ A."
            )
        numbers, start = [torch.zeros(0, dtype=self.domain.dtype, device=self.device)], 0
        for leaves in sweep_leaves(self._rows_of, self.codomain.leaves, MANY):
            rows = self.domain.rows(leaves)
            numbers.append(rows.diagonal(start).clone())  # a view would keep all rows
            start += len(rows)
        return self.domain.tree(torch.cat(numbers))

    def into(self, sink: Sink, chunk_size: int | None = MANY) -> Blocks:
        """What a sink makes of the matrix, by rows or by columns, whichever are fewer."""
        check_chunk_size(self.api, chunk_size)
        primals, outputs = self.domain.leaves, self.codomain.leaves
        rows = partial(sweep_leaves, self._rows_of, outputs)
        if self.codomain.size <= self.domain.size:
            return sink.rows(rows, chunk_size, outputs, primals)
        columns = partial(sweep, lambda x: check_numbers(self.pushforward_batch(x)), primals)
        try:
            return sink.columns(columns, chunk_size, lambda: outputs, primals)
        except Refused as refusal:
            note("the matrix takes rows, as columns were refused: %s", refusal)
        return sink.rows(rows, chunk_size, outputs, primals)

    def _rows_of(self, cotangents: Leaves, of: slice) -> Leaves:
        """Rows ``[K, *in]`` for cotangents of the output leaves in a slice."""
        numbers = range(len(self.codomain.leaves))[of]
        return self.pullback_batch(self.codomain.spread(cotangents, numbers))

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, for SciPy's solvers of equations and spectra.

        Raises:
            ImportError: without SciPy, which the extra ``scipy`` brings.

        Cost:
            Each product as of this operator, and a copy of the vector if it is not on a CPU.

        Example:
            >>> import torch, jacfunc
            >>> from scipy.sparse.linalg import svds
            >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
            >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(5, dtype=torch.float64))
            >>> svds(J.to_scipy(), k=1, return_singular_vectors=False)
            array([5.])
        """
        push = on_rows(self.domain, self.codomain, self.pushforward_batch)
        pull = on_rows(self.codomain, self.domain, self.pullback_batch)
        return scipy_operator(self.shape, self.dtype, push, pull)


class SumOfSquares(Sink):
    """Adds up the squares of all entries of a matrix, as the only block."""

    def rows(self, sweep: Sweep, chunk: Chunk, outputs: Leaves, primals: Leaves) -> Blocks:
        return self._total(sweep(chunk))

    def columns(
        self, sweep: Sweep, chunk: Chunk, outputs: Callable[[], Leaves], primals: Leaves
    ) -> Blocks:
        return self._total(sweep(chunk))

    def _total(self, chunks: Iterable[Leaves]) -> Blocks:
        leaves = (leaf for chunk in chunks for leaf in chunk)
        squares = [x.to(_computed_in(x.dtype)).square().sum() for x in leaves]
        return ((torch.stack(squares).sum(),),)


def by_products(
    api: str,
    operator: Products,
    estimator: object,
    method: str,
    known: str,
    *,
    is_square: bool = True,
) -> ByProducts:
    """The operator as estimators see it, after checks of both.

    Raises:
        TypeError, ValueError: what is no operator, is empty or not square, or estimates another
            number.
    """
    if not isinstance(operator, Products):
        raise TypeError(
            f"{api}: operator must be a LinearOperator, got {type(operator).__name__}. Make one "
            "with jacfunc.linearize(func, x)."
        )
    rows, columns = operator.shape
    if not rows * columns or (is_square and rows != columns):
        must = "be square, with rows" if is_square else "have rows and columns"
        raise ValueError(
            f"{api}: the operator must {must}, got {rows} × {columns}. Restrict it, or take "
            "that of A.T @ A."
        )
    is_one = callable(getattr(estimator, method, None)) and not isinstance(estimator, type)
    if estimator is not None and not is_one:
        raise TypeError(
            f"{api}: estimator must be {known}, or None for the exact value, got "
            f"{type(estimator).__name__}. They are in jacfunc.estimators, as in XTrace(100)."
        )
    return seen_by_estimators(api, operator)


def seen_by_estimators(api: str, operator: Products) -> ByProducts:
    """The operator as a matrix that is known by its products."""
    dtype, domain, codomain = _computed_in(operator.dtype), operator.domain, operator.codomain
    push = on_rows(domain, codomain, operator.pushforward_batch)
    pull = on_rows(codomain, domain, operator.pullback_batch)
    return ByProducts(
        api,
        operator.shape,
        dtype,
        operator.device,
        max(torch.finfo(x.dtype).eps for x in (*domain.leaves, *codomain.leaves)),
        lambda rows: push(rows).to(dtype),
        lambda rows: pull(rows).to(dtype),
        lambda: domain.flat(operator.diagonal()).to(dtype),
    )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Half precision loses sums, and has no factorizations."""
    return torch.promote_types(dtype, torch.float32)
