"""Jacobians of samples as factors, which are held until blocks are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from jacfunc._assembly import empty
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._memory import MOST_SWEPT_BYTES, Chunk, evenly, in_chunks, of_leaf
from jacfunc._torch import memory_of
from jacfunc._types import Leaves
from jacfunc.layers import Rows


@dataclass(frozen=True)
class Cell:
    """Some rows of one output leaf, of samples that were evaluated together."""

    factors: FactoredJacobian
    samples: slice
    leaf: int
    rows: slice

    def parts(self) -> list[list[Part]]:
        """The parts of each parameter's Jacobian."""
        return self.factors.parts_of_rows(self.rows.start, self.rows.stop, self.leaf)

    def write(self, parts: Sequence[list[Part]], blocks: Sequence[Tensor], start: int = 0) -> None:
        """Write parts into blocks ``[B, K, *param]`` of all samples and the rows from ``start``."""
        rows = slice(self.rows.start - start, self.rows.stop - start)
        self.factors.write(parts, [block[self.samples, rows] for block in blocks])


Fill = Callable[[Cell, list[list[Part]]], None]
"""Takes the parts of each parameter's Jacobian in a cell."""


@dataclass(frozen=True)
class HeldSamples:
    """The Jacobians of consecutive samples as factors: of all together, or of each alone."""

    every: Sequence[FactoredJacobian]

    @cached_property
    def outputs(self) -> Leaves:
        """The outputs of one sample."""
        return self.every[0].sample_outputs

    @cached_property
    def params(self) -> Leaves:
        """All parameters."""
        return self.every[0].params

    @cached_property
    def size(self) -> int:
        """How many samples there are."""
        return sum(factors.size for factors in self.every)

    @cached_property
    def row_bytes(self) -> int:
        """The bytes of a row of all samples."""
        return self.size * sum(param.nbytes for param in self.params)

    @cached_property
    def most_bytes(self) -> int:
        """The bytes of the largest parameter's rows."""
        rows = self.size * sum(out.numel() for out in self.outputs)
        return rows * max((param.nbytes for param in self.params), default=0)

    def dtype(self, leaf: int, number: int) -> torch.dtype:
        """The dtype of the block of an output leaf by a parameter."""
        return torch.promote_types(self.outputs[leaf].dtype, self.params[number].dtype)

    def place(self, leaf: int, number: int, rows: int) -> Tensor:
        """A place ``[B, K, *param]`` for so many rows of an output leaf by a parameter."""
        param = self.params[number]
        return empty(param, (self.size, rows, *param.shape), self.dtype(leaf, number))

    def sweep(self, leaf: int, rows: slice, chunk: Chunk, fill: Fill) -> None:
        """Pull rows of an output leaf back, and hand their parts to ``fill``.

        ``chunk`` says how many at once; by default as many as the heap keeps the cotangents of.
        """
        total = rows.stop - rows.start
        stops = accumulate((factors.size for factors in self.every), initial=0)
        for factors, ends in zip(self.every, pairwise(stops), strict=True):

            def take(
                start: int,
                stop: int,
                factors: FactoredJacobian = factors,
                samples: slice = slice(*ends),
            ) -> Leaves:
                some = slice(rows.start + start, rows.start + stop)
                cell = Cell(factors, samples, leaf, some)
                fill(cell, cell.parts())
                return ()

            at_once = chunk or evenly(total, factors.nbytes, MOST_SWEPT_BYTES)
            for _ in in_chunks(total, of_leaf(at_once, leaf), take):
                pass

    def rows(self, leaf: int, rows: slice, chunk: Chunk = None) -> Leaves:
        """Rows of an output leaf, ``[B, K, *param]`` of each parameter."""
        width = rows.stop - rows.start
        blocks = [self.place(leaf, number, width) for number in range(len(self.params))]
        self.sweep(leaf, rows, chunk, lambda cell, parts: cell.write(parts, blocks, rows.start))
        return tuple(blocks)


@dataclass
class HeldParts:
    """The parts of one parameter's Jacobian, which wait to be written."""

    cells: list[tuple[Cell, list[Part]]] = field(default_factory=list)
    nbytes: int = 0
    """The bytes that the parts keep."""
    _memories: set[int] = field(default_factory=set)

    def add(self, cell: Cell, parts: list[Part], param: Tensor, dtype: torch.dtype) -> None:
        """Hold parts; or what they are written out as, where that is less."""
        new = {key: nbytes for key, nbytes in _storages(parts) if key not in self._memories}
        shape = (cell.factors.size, cell.rows.stop - cell.rows.start, *param.shape)
        written = prod(shape) * dtype.itemsize
        if sum(new.values()) > written:
            block = param.new_empty(shape, dtype=dtype)
            cell.factors.write([parts], [block])
            parts = [Part((), Rows(block.transpose(0, 1)))]
            new = dict(_storages(parts))
        self.cells.append((cell, parts))
        self.nbytes += sum(new.values())
        self._memories |= new.keys()


def _storages(parts: list[Part]) -> Iterator[tuple[int, int]]:
    """A number of each storage that parts keep, and its bytes."""
    for part in parts:
        for value in vars(part.form).values():
            if isinstance(value, Tensor):
                yield memory_of(value), value.untyped_storage().nbytes()


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

    def of(self, number: int) -> Leaves:
        """The blocks of a parameter, ``[B, M, *param]`` for each output leaf."""
        outputs, held = self._samples.outputs, self._held.pop(number, None)
        blocks = [self._samples.place(i, number, out.numel()) for i, out in enumerate(outputs)]
        if held is None:
            self._sweep(number, blocks)
        else:
            for cell, parts in held.cells:
                cell.write([parts], [blocks[cell.leaf]])
        return tuple(blocks)

    def _sweep(self, number: int, blocks: list[Tensor]) -> None:
        """Fill the blocks of a parameter by a sweep that holds parts of those that follow."""
        samples = self._samples
        self._held = {later: HeldParts() for later in range(number + 1, len(samples.params))}

        def fill(cell: Cell, parts: list[list[Part]]) -> None:
            cell.write([parts[number]], [blocks[cell.leaf]])
            self._hold(cell, parts)

        for leaf, out in enumerate(samples.outputs):
            samples.sweep(leaf, slice(0, out.numel()), self._chunk, fill)

    def _hold(self, cell: Cell, parts: list[list[Part]]) -> None:
        """Hold parts of the parameters that follow; the last of them go where room is short."""
        params, taken = self._samples.params, sum(held.nbytes for held in self._held.values())
        for number in tuple(self._held):
            if number not in self._held:
                return
            held = self._held[number]
            before = held.nbytes
            held.add(cell, parts[number], params[number], self._samples.dtype(cell.leaf, number))
            taken += held.nbytes - before
            while taken > self._room:
                taken -= self._held.popitem()[1].nbytes
