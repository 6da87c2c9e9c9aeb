"""Sinks, which take the products of a sweep: as a tensor for each block, or as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from jacfunc._arguments import are_plain
from jacfunc._assembly.basis import numel
from jacfunc._assembly.blocks import (
    allocated,
    columns_to_blocks,
    rows_to_blocks,
    stack,
    stacked_rows,
)
from jacfunc._assembly.pages import empty
from jacfunc._memory import STAGED_BYTES, Chunk, FittedChunks, all_bytes, evenly
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc._units import in_bytes

VAST = 2**28
"""Entries of a result of which it is asked whether the machine can hold them."""

Sweep: TypeAlias = Callable[[Chunk], Iterable[Leaves]]
"""Gives the products of all seeds, chunk by chunk, for a number of seeds at once."""


@dataclass(eq=False)
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
            torch.promote_types, {x.dtype for x in leaves} or {torch.get_default_dtype()}
        )
        device = leaves[0].device if leaves else torch.get_default_device()
        return cls([x.numel() for x in outputs], [x.numel() for x in primals], dtype, device)


class Sink:
    """Takes the products of a sweep and returns blocks, each a tensor of its own.

    Args:
        dtype: of the blocks; None for that of the products.
        device: of the blocks; None for that of the products.
    """

    copies = False
    """Are products written elsewhere, rather than being the result themselves?"""
    allocates = True
    """Does the result take new memory, rather than that of the user's tensors?"""

    def __init__(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        self.dtype = dtype
        self.device = device
        if dtype is not None or device is not None:
            self.copies = True

    def placed(self, tree: Tree) -> Tree:
        """The tree that the user gets, from a tree of finished blocks."""
        return tree

    def check_fits(self, outputs: Leaves, primals: Leaves) -> None:
        """Refuse a result that is larger than the machine, before a sweep fills its memory.

        Raises:
            RuntimeError: as an allocator does.
        """
        count = numel(outputs) * numel(primals)
        if not self.allocates or count < VAST or not are_plain(primals) or is_compiling():
            return
        grid = Grid.of(outputs, primals)
        device = torch.device(self.device or grid.device)
        needed, there = count * (self.dtype or grid.dtype).itemsize, 0
        if device.type != "meta" and needed > (there := all_bytes(device)):
            raise RuntimeError(
                f"not enough memory for a result of {in_bytes(needed)} on a machine with "
                f"{in_bytes(there)}"
            )

    def at_once(self, chunk: Chunk) -> Chunk:
        """How many seeds or samples are swept at once: not all, where their products are copied."""
        return FittedChunks.by_share(STAGED_BYTES) if chunk is None and self.copies else chunk

    def rows(self, sweep: Sweep, chunk: Chunk, outputs: Leaves, primals: Leaves) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from a sweep that gives chunks of rows ``[K, *in_j]``."""
        if not self.copies:
            return stacked_rows(sweep(chunk), outputs, primals)
        total, each = numel(outputs), sum(x.numel() * x.itemsize for x in primals)
        if chunk is None:  # the size of rows is known before there is one
            chunk = max(1, evenly(total, each, max(STAGED_BYTES, total * each // 8)))
        rows = stack(sweep(chunk), total, partial(self.into_rows, Grid.of(outputs, primals)))
        return rows_to_blocks(rows, outputs, primals, self.dtype)

    def columns(
        self, sweep: Sweep, chunk: Chunk, outputs: Callable[[], Leaves], primals: Leaves
    ) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from a sweep that gives chunks of columns ``[K, *out_i]``.

        The outputs are known after the first chunk.
        """

        def into(first: Leaves, total: int) -> Leaves:
            return self.into_columns(Grid.of(outputs(), primals), first, total)

        chunks = sweep(self.at_once(chunk))
        columns = stack(chunks, numel(primals), into if self.copies else allocated)
        return columns_to_blocks(columns, outputs(), primals, self.dtype)

    def samples(self, chunks: Iterable[Leaves], size: int, grid: Callable[[], Grid]) -> Leaves:
        """Blocks ``[B, *out_i, *in_j]`` from chunks of samples; leaves beside them are stacked."""

        def into(first: Leaves, total: int) -> Leaves:
            return self.places(first, total, grid())

        return stack(chunks, size, into if self.copies else allocated)

    def places(self, first: Leaves, size: int, grid: Grid) -> Leaves:
        """The tensors that all chunks of samples are written into, made from the first chunk."""
        if not self.copies:
            return allocated(first, size)
        count = len(grid.rows) * len(grid.columns)
        return (*self.into_samples(grid, first[:count], size), *allocated(first[count:], size))

    def into_rows(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        """The tensors that rows are written into, one for each input leaf."""
        return self._apart(first, total)

    def into_columns(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        """The tensors that columns are written into, one for each output leaf."""
        return self._apart(first, total)

    def into_samples(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        """The tensors that blocks of all samples are written into."""
        return self._apart(first, total)

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The blocks in the form that the user asked for; they may not be in their places yet."""
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
    """Writes all blocks into one matrix ``[*batch, M, N]``, which is the single block returned."""

    copies = True
    matrix: Tensor | None = None

    def into_rows(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        matrix = self._empty(first, (total, sum(grid.columns)), grid)
        return _as_places(matrix.split(grid.columns, 1), first)

    def into_columns(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        matrix = self._empty(first, (sum(grid.rows), total), grid)
        return _as_places(matrix.t().split(grid.rows, 1), first)

    def into_samples(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        matrix = self._empty(first, (total, sum(grid.rows), sum(grid.columns)), grid)
        rows = matrix.split(grid.rows, 1)
        return _as_places([p for row in rows for p in row.split(grid.columns, 2)], first)

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The matrix; concatenated from the blocks where nothing was written into it.

        Nothing is where blocks carry a graph, or come from a strategy that returns blocks alone.
        """
        if self.matrix is None or any(block.requires_grad for row in blocks for block in row):
            self.matrix = _concatenated(blocks, grid, batch).to(self.device, self.dtype)
        return ((self.matrix,),)

    def _empty(self, products: Leaves, shape: tuple[int, ...], grid: Grid) -> Tensor:
        dtype = self.dtype or grid.dtype
        self.matrix = empty(products[0], shape, dtype, self.device)
        return self.matrix


def _as_places(parts: Sequence[Tensor], first: Leaves) -> Leaves:
    """Parts of the matrix, viewed in the shapes of the products that are written there."""
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
