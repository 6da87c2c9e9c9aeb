"""Where the products of a sweep go: a tensor a block, or one matrix that they are written into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly.basis import numel
from jacfunc._assembly.blocks import (
    Allocate,
    allocated,
    columns_to_blocks,
    rows_to_blocks,
    stack,
    stacked_rows,
)
from jacfunc._assembly.pages import empty
from jacfunc._memory import STAGED_BYTES, Chunk, FittedChunks, evenly
from jacfunc._types import Blocks, Leaves, Tree

Sweep: TypeAlias = Callable[[Chunk], Iterable[Leaves]]
"""From the number of seeds at once to the products of all seeds, chunk by chunk."""


@dataclass(frozen=True)
class Grid:
    """The Jacobian as a matrix: rows of each output leaf, columns of each input leaf."""

    rows: list[int]
    columns: list[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, outputs: Leaves, primals: Leaves) -> Grid:
        leaves = (*outputs, *primals)
        dtype = reduce(
            torch.promote_types, [x.dtype for x in leaves] or [torch.get_default_dtype()]
        )
        device = leaves[0].device if leaves else torch.get_default_device()
        return cls([x.numel() for x in outputs], [x.numel() for x in primals], dtype, device)


class Sink:
    """A tensor a block; of another dtype or on another device, where one is named."""

    copies = False
    """Are products written elsewhere, rather than being the result themselves?"""

    def __init__(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        self.dtype = dtype
        self.device = device
        if dtype is not None or device is not None:
            self.copies = True

    def placed(self, tree: Tree) -> Tree:
        """The finished blocks, as the tree that is returned."""
        return tree

    def at_once(self, chunk: Chunk) -> Chunk:
        """Seeds, or samples, of one sweep: not all, where their products are copied."""
        return FittedChunks.by_share(STAGED_BYTES) if chunk is None and self.copies else chunk

    def rows(self, sweep: Sweep, chunk: Chunk, outputs: Leaves, primals: Leaves) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from a sweep that gives chunks of rows ``[K, *in_j]``."""
        if not self.copies:
            return stacked_rows(sweep(chunk), outputs, primals)
        total, each = numel(outputs), sum(primal.nbytes for primal in primals)
        if chunk is None:  # how large rows are is known before the first
            chunk = max(1, evenly(total, each, max(STAGED_BYTES, total * each // 8)))
        rows = stack(sweep(chunk), total, self.into_rows(Grid.of(outputs, primals)))
        return rows_to_blocks(rows, outputs, primals, self.dtype)

    def columns(
        self, sweep: Sweep, chunk: Chunk, outputs: Callable[[], Leaves], primals: Leaves
    ) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from a sweep that gives chunks of columns ``[K, *out_i]``.

        The outputs are known after the first chunk.
        """

        def into(first: Leaves, total: int) -> Leaves:
            return self.into_columns(Grid.of(outputs(), primals))(first, total)

        chunks = sweep(self.at_once(chunk))
        columns = stack(chunks, numel(primals), into if self.copies else allocated)
        return columns_to_blocks(columns, outputs(), primals, self.dtype)

    def samples(self, chunks: Iterable[Leaves], size: int, grid: Callable[[], Grid]) -> Leaves:
        """Blocks ``[B, *out_i, *in_j]`` from chunks of them; what comes beside is stacked."""

        def into(first: Leaves, total: int) -> Leaves:
            return self.places(first, total, grid())

        return stack(chunks, size, into if self.copies else allocated)

    def places(self, first: Leaves, size: int, grid: Grid) -> Leaves:
        """What all chunks of samples are written into, from the first of them."""
        if not self.copies:
            return allocated(first, size)
        count = len(grid.rows) * len(grid.columns)
        return (*self.into_samples(grid)(first[:count], size), *allocated(first[count:], size))

    def into_rows(self, grid: Grid) -> Allocate:
        """Places for rows of all input leaves."""
        return self._apart

    def into_columns(self, grid: Grid) -> Allocate:
        """Places for columns of all output leaves."""
        return self._apart

    def into_samples(self, grid: Grid) -> Allocate:
        """Places for blocks of many samples."""
        return self._apart

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The blocks as they were wanted, by whomever they were made."""
        if not self.copies:
            return blocks
        return tuple(tuple(block.to(self.device, self.dtype) for block in row) for row in blocks)

    def _apart(self, first: Leaves, total: int) -> Leaves:
        return tuple(
            empty(product, (total, *product.shape[1:]), self.dtype, self.device)
            for product in first
        )


NEW_TENSORS = Sink()


class MatrixSink(Sink):
    """All blocks as parts of one matrix ``[*batch, M, N]``: it is the single block at the end."""

    copies = True
    matrix: Tensor | None = None

    def into_rows(self, grid: Grid) -> Allocate:
        def allocate(first: Leaves, total: int) -> Leaves:
            matrix = self._empty(first, (total, sum(grid.columns)), grid)
            return _as_places(matrix.split(grid.columns, 1), first)

        return allocate

    def into_columns(self, grid: Grid) -> Allocate:
        def allocate(first: Leaves, total: int) -> Leaves:
            matrix = self._empty(first, (sum(grid.rows), total), grid)
            return _as_places(matrix.t().split(grid.rows, 1), first)

        return allocate

    def into_samples(self, grid: Grid) -> Allocate:
        def allocate(first: Leaves, total: int) -> Leaves:
            matrix = self._empty(first, (total, sum(grid.rows), sum(grid.columns)), grid)
            rows = matrix.split(grid.rows, 1)
            return _as_places([p for row in rows for p in row.split(grid.columns, 2)], first)

        return allocate

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The matrix; concatenated, where the blocks carry a graph or a strategy wrote none."""
        if self.matrix is None:
            self.matrix = _concatenated(blocks, grid, batch).to(self.device, self.dtype)
        return ((self.matrix,),)

    def _empty(self, products: Leaves, shape: tuple[int, ...], grid: Grid) -> Tensor:
        dtype = self.dtype or grid.dtype
        self.matrix = empty(products[0], shape, dtype, self.device)
        return self.matrix


def _as_places(parts: Sequence[Tensor], first: Leaves) -> Leaves:
    """Parts of the matrix in the shapes of what is written there."""
    pairs = zip(parts, first, strict=True)
    return tuple(part.view(part.shape[0], *product.shape[1:]) for part, product in pairs)


def _concatenated(blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Tensor:
    rows = [
        torch.cat([b.reshape(*batch, m, n) for b, n in zip(row, grid.columns, strict=True)], -1)
        for row, m in zip(blocks, grid.rows, strict=True)
        if row
    ]
    if rows:
        return torch.cat(rows, -2)
    shape = (*batch, sum(grid.rows), sum(grid.columns))
    return torch.zeros(shape, dtype=grid.dtype, device=grid.device)
