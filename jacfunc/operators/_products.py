"""Products of a linear map between two trees, and its matrix by products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import NEW_TENSORS, Grid, Sink, sink_for, sweep, sweep_leaves
from jacfunc._errors import Refused
from jacfunc._linear_map import check_numbers
from jacfunc._log import note
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc.operators._space import Space

MANY = 256
"""Seeds that are swept at once, where a whole matrix is asked for."""


class Products(ABC):
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
        """Of the matrix."""
        return torch.promote_types(self.domain.dtype, self.codomain.dtype)

    @property
    def device(self) -> torch.device:
        """Of the matrix."""
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
        count = cotangents[0].shape[:1] if cotangents else ()
        every = [x.new_zeros(*count, *x.shape) for x in self.codomain.leaves]
        every[of] = cotangents
        return self.pullback_batch(tuple(every))
