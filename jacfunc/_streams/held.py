"""Jacobians of samples as factors, which are held until blocks are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._assembly import empty
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._linear_map import EVERY, detached
from jacfunc._lock import kept_property
from jacfunc._memory import (
    LARGE,
    MOST_SWEPT_BYTES,
    PAGED_BYTES,
    Chunk,
    at_most,
    evenly,
    in_chunks,
    is_on_a_budget,
    of_leaf,
)
from jacfunc._types import Leaves


def least_paged() -> int:
    """The bytes of the smallest block that is written into pages of earlier ones."""
    return LARGE if is_on_a_budget() else PAGED_BYTES


@dataclass(frozen=True)
class Cell:
    """Some rows of one output leaf, pulled back: the parts of each parameter's Jacobian.

    Args:
        samples: which samples were evaluated.
    """

    leaf: int
    rows: slice
    parts: list[list[Part]]
    samples: slice

    def holds(self, leaf: int, rows: slice) -> bool:
        """Are these rows among them?"""
        mine = self.rows
        return leaf == self.leaf and mine.start <= rows.start and rows.stop <= mine.stop

    def of(self, samples: slice, rows: slice) -> list[list[Part]]:
        """The parts of some of the samples and rows."""
        seeds = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        return [[part.of_samples(samples, seeds) for part in parts] for parts in self.parts]


@dataclass(frozen=True)
class Shapes:
    """What blocks look like.

    Args:
        outputs: those of one sample, without a graph.
        params: all parameters.
    """

    outputs: Leaves
    params: Leaves

    @kept_property
    def num_rows(self) -> int:
        """How many rows the Jacobian of a sample has."""
        return sum(out.numel() for out in self.outputs)

    def dtype(self, leaf: int, number: int) -> torch.dtype:
        """The dtype of the block of an output leaf by a parameter."""
        return torch.promote_types(self.outputs[leaf].dtype, self.params[number].dtype)

    def nbytes(self, number: int) -> int:
        """The bytes of all rows of a sample by a parameter."""
        numel = self.params[number].numel()
        leaves = enumerate(self.outputs)
        return sum(self.dtype(i, number).itemsize * out.numel() * numel for i, out in leaves)

    @kept_property
    def sample_bytes(self) -> int:
        """The bytes of all rows of a sample."""
        return sum(map(self.nbytes, range(len(self.params))))

    def place(self, leaf: int, number: int, size: int, rows: int) -> Tensor:
        """A place ``[B, K, *param]`` for rows of some samples."""
        param = self.params[number]
        shape, dtype = (size, rows, *param.shape), self.dtype(leaf, number)
        return empty(param, shape, dtype, least=least_paged())

    def places(self, leaf: int, size: int, rows: int) -> Leaves:
        """Places ``[B, K, *param]`` for rows of some samples, one for each parameter."""
        return tuple(self.place(leaf, n, size, rows) for n in range(len(self.params)))


@dataclass(frozen=True)
class HeldSamples:
    """Samples that were evaluated, with their Jacobian as factors; its blocks are written later."""

    factors: FactoredJacobian

    @kept_property
    def shapes(self) -> Shapes:
        """What their blocks look like."""
        return Shapes(detached(self.factors.sample_outputs), self.factors.params)

    @property
    def outputs(self) -> Leaves:
        """The outputs of one sample."""
        return self.shapes.outputs

    @property
    def size(self) -> int:
        """How many samples there are."""
        return self.factors.size

    @kept_property
    def row_bytes(self) -> int:
        """The bytes of a row of all samples."""
        return self.size * sum(param.nbytes for param in self.factors.params)

    @kept_property
    def factor_bytes(self) -> int:
        """The bytes of what all rows are pulled back to."""
        return self.shapes.num_rows * self.factors.nbytes

    def sweep(
        self, leaf: int, chunk: Chunk, fill: Callable[[Cell], None], samples: slice = EVERY
    ) -> None:
        """Pull all rows of an output leaf back, and hand them to ``fill``.

        ``chunk`` says how many at once; by default as many as the heap keeps the cotangents of, and
        at most so many on a budget.
        ``samples`` are those that were evaluated.
        """

        def take(start: int, stop: int) -> Leaves:
            parts = self.factors.parts_of_rows(start, stop, leaf)
            fill(Cell(leaf, slice(start, stop), parts, samples))
            return ()

        total = self.outputs[leaf].numel()
        at_once = chunk
        if chunk is None or (is_on_a_budget() and isinstance(chunk, int)):
            fitting = evenly(total, self.factors.nbytes, at_most(MOST_SWEPT_BYTES))
            at_once = min(fitting, chunk or fitting)
        for _ in in_chunks(total, of_leaf(at_once, leaf), take):
            pass

    def all_rows(self, leaf: int) -> Leaves:
        """All rows of an output leaf, ``[B, M, *param]`` of each parameter."""
        blocks = self.shapes.places(leaf, self.size, self.outputs[leaf].numel())

        def fill(cell: Cell) -> None:
            self.factors.write(cell.parts, [block[:, cell.rows] for block in blocks])

        self.sweep(leaf, None, fill)
        return blocks


class RowBlocks:
    """Blocks of rows.

    Args:
        sweeps_more: may more rows be pulled back at once than a block has, and held as factors?
    """

    def __init__(self, samples: HeldSamples, sweeps_more: bool) -> None:
        self._samples, self._sweeps_more = samples, sweeps_more
        self._cell: Cell | None = None

    def of(self, leaf: int, start: int, stop: int) -> Leaves:
        """Rows of an output leaf, ``[B, K, *param]`` of each parameter."""
        factors, width = self._samples.factors, stop - start
        if self._cell is None or not self._cell.holds(leaf, slice(start, stop)):
            self._cell = None  # or it would stay beside the next one
            fitting = MOST_SWEPT_BYTES // max(1, factors.nbytes * width)
            blocks_at_once = max(1, fitting) if self._sweeps_more else 1
            end = min(start + width * blocks_at_once, self._samples.outputs[leaf].numel())
            parts = factors.parts_of_rows(start, end, leaf)
            self._cell = Cell(leaf, slice(start, end), parts, EVERY)
        blocks = self._samples.shapes.places(leaf, factors.size, width)
        factors.write(self._cell.of(EVERY, slice(start, stop)), blocks)
        return blocks
