"""Jacobians of samples as factors, which are held until blocks are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from jacfunc._assembly import empty
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._linear_map import EVERY
from jacfunc._lock import kept_property
from jacfunc._memory import LARGE, MOST_SWEPT_BYTES, Chunk, evenly, in_chunks, of_leaf
from jacfunc._torch import memory_of
from jacfunc._types import Leaves
from jacfunc.layers import Rows


@dataclass(frozen=True)
class Cell:
    """Some rows of one output leaf, pulled back: the parts of each parameter's Jacobian."""

    leaf: int
    rows: slice
    parts: list[list[Part]]

    def holds(self, leaf: int, rows: slice) -> bool:
        """Are these rows among them?"""
        mine = self.rows
        return leaf == self.leaf and mine.start <= rows.start and rows.stop <= mine.stop

    def of(self, samples: slice, rows: slice) -> list[list[Part]]:
        """The parts of some of the samples and rows."""
        seeds = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        return [[part.of_samples(samples, seeds) for part in parts] for parts in self.parts]


@dataclass(frozen=True)
class HeldSamples:
    """Samples that were evaluated, with their Jacobian as factors; its blocks are written later.

    Args:
        most_swept: bytes of cotangents that are swept at once, where no chunk says how many rows.
    """

    factors: FactoredJacobian
    most_swept: int = MOST_SWEPT_BYTES

    @kept_property
    def outputs(self) -> Leaves:
        """The outputs of one sample."""
        return self.factors.sample_outputs

    @property
    def params(self) -> Leaves:
        """All parameters."""
        return self.factors.params

    @property
    def size(self) -> int:
        """How many samples there are."""
        return self.factors.size

    @kept_property
    def num_rows(self) -> int:
        """How many rows the Jacobian of a sample has."""
        return sum(out.numel() for out in self.outputs)

    @kept_property
    def row_bytes(self) -> int:
        """The bytes of a row of all samples."""
        return self.size * sum(param.nbytes for param in self.params)

    @kept_property
    def most_bytes(self) -> int:
        """The bytes of the largest parameter's rows."""
        largest = max((param.nbytes for param in self.params), default=0)
        return self.size * self.num_rows * largest

    @kept_property
    def factor_bytes(self) -> int:
        """The bytes of what all rows are pulled back to."""
        return self.num_rows * self.factors.nbytes

    def dtype(self, leaf: int, number: int) -> torch.dtype:
        """The dtype of the block of an output leaf by a parameter."""
        return torch.promote_types(self.outputs[leaf].dtype, self.params[number].dtype)

    def place(self, leaf: int, number: int, size: int, rows: int) -> Tensor:
        """A place ``[B, K, *param]`` for rows of some samples."""
        param = self.params[number]
        return empty(param, (size, rows, *param.shape), self.dtype(leaf, number))

    def places(self, leaf: int, size: int, rows: int) -> Leaves:
        """Places ``[B, K, *param]`` for rows of some samples, one for each parameter."""
        return tuple(self.place(leaf, n, size, rows) for n in range(len(self.params)))

    def sweep(self, leaf: int, chunk: Chunk, fill: Callable[[Cell], None]) -> None:
        """Pull all rows of an output leaf back, and hand them to ``fill``.

        ``chunk`` says how many at once; by default as many as the heap keeps the cotangents of.
        """

        def take(start: int, stop: int) -> Leaves:
            fill(Cell(leaf, slice(start, stop), self.factors.parts_of_rows(start, stop, leaf)))
            return ()

        total = self.outputs[leaf].numel()
        at_once = chunk or evenly(total, self.factors.nbytes, self.most_swept)
        for _ in in_chunks(total, of_leaf(at_once, leaf), take):
            pass

    def all_rows(self, leaf: int) -> Leaves:
        """All rows of an output leaf, ``[B, M, *param]`` of each parameter."""
        blocks = self.places(leaf, self.size, self.outputs[leaf].numel())

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
            self._cell = Cell(leaf, slice(start, end), factors.parts_of_rows(start, end, leaf))
        blocks = self._samples.places(leaf, factors.size, width)
        factors.write(self._cell.of(EVERY, slice(start, stop)), blocks)
        return blocks


@dataclass
class HeldParts:
    """The parts of one parameter's Jacobian, which wait to be written."""

    cells: list[tuple[int, slice, list[Part]]] = field(default_factory=list)
    nbytes: int = 0
    """The bytes that the parts keep."""
    _memories: set[int] = field(default_factory=set)

    def add(self, samples: HeldSamples, cell: Cell, number: int) -> None:
        """Hold the parts of parameter ``number``; or the rows themselves, where these are less."""
        parts, param = cell.parts[number], samples.params[number]
        dtype = samples.dtype(cell.leaf, number)
        new = {key: nbytes for key, nbytes in _storages(parts).items() if key not in self._memories}
        shape = (samples.size, cell.rows.stop - cell.rows.start, *param.shape)
        written = prod(shape) * dtype.itemsize
        if sum(new.values()) > written:
            block = param.new_empty(shape, dtype=dtype)
            samples.factors.write([parts], [block])
            parts = [Part((), Rows(block.transpose(0, 1)))]
            new = _storages(parts)
        self.cells.append((cell.leaf, cell.rows, parts))
        self.nbytes += sum(new.values())
        self._memories |= new.keys()


def _storages(parts: list[Part]) -> dict[int, int]:
    """The bytes of each storage that parts keep, by a number of it."""
    tensors = [x for part in parts for x in vars(part.form).values() if isinstance(x, Tensor)]
    return {memory_of(x): x.untyped_storage().nbytes() for x in tensors}


class ParameterBlocks:
    """The blocks of one parameter after the other; parts of those that follow are held meanwhile.

    One sweep of all rows serves as many parameters as there is room for.

    Args:
        room: bytes that parts may take.
        chunk: rows that are pulled back at once.
    """

    def __init__(self, samples: HeldSamples, room: int, chunk: Chunk) -> None:
        self._samples, self._room, self._chunk = samples, room, chunk
        self._held: dict[int, HeldParts] = {}
        self._keep_pages()

    def _keep_pages(self) -> None:
        """Have pages for blocks of each size, or those of one size would go for those of the next.

        Pages serve what is larger than half of them, so they take no more than two largest blocks.
        """
        places, last = list[Leaves](), sys.maxsize
        for number, param in sorted(enumerate(self._samples.params), key=lambda x: -x[1].nbytes):
            nbytes = self._samples.size * self._samples.num_rows * param.nbytes
            if LARGE <= nbytes <= last // 2 and not param.is_cuda:
                places.append(self._blocks(number))
                last = nbytes

    def of(self, number: int) -> Leaves:
        """The blocks of a parameter, ``[B, M, *param]`` for each output leaf."""
        blocks, held = self._blocks(number), self._held.pop(number, None)
        if held is None:
            self._sweep(number, blocks)
        else:
            for leaf, rows, parts in held.cells:
                self._samples.factors.write([parts], [blocks[leaf][:, rows]])
        return blocks

    def _blocks(self, number: int) -> Leaves:
        """Places for the blocks of a parameter."""
        of, outputs = self._samples, enumerate(self._samples.outputs)
        return tuple(of.place(i, number, of.size, out.numel()) for i, out in outputs)

    def _sweep(self, number: int, blocks: Leaves) -> None:
        """Fill the blocks of a parameter by a sweep that holds parts of those that follow."""
        samples = self._samples
        self._held = {later: HeldParts() for later in range(number + 1, len(samples.params))}

        def fill(cell: Cell) -> None:
            samples.factors.write([cell.parts[number]], [blocks[cell.leaf][:, cell.rows]])
            self._hold(cell)

        for leaf in range(len(samples.outputs)):
            samples.sweep(leaf, self._chunk, fill)

    def _hold(self, cell: Cell) -> None:
        """Hold parts of the parameters that follow; the last of them go where room is short."""
        taken = sum(held.nbytes for held in self._held.values())
        for number in tuple(self._held):
            if number not in self._held:
                return
            held = self._held[number]
            before = held.nbytes
            held.add(self._samples, cell, number)
            taken += held.nbytes - before
            while taken > self._room:
                taken -= self._held.popitem()[1].nbytes
