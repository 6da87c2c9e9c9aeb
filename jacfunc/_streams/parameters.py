"""Blocks of one parameter after the other; what belongs to later ones is held meanwhile."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from torch import Tensor

from jacfunc._factored import Part, write
from jacfunc._memory import MODEST_BYTES, FittedChunks, free_bytes
from jacfunc._streams.held import Cell, HeldSamples, Shapes, least_paged
from jacfunc._streams.streamed import StreamedCall
from jacfunc._torch import memory_of
from jacfunc._types import Leaves

HELD_SHARE = 8
"""What is held for later blocks may take an eighth of the free memory, if no budget is given."""

PAGED = 4
"""On a budget of less than so many blocks, none has pages that are kept for others."""


@dataclass
class HeldParts:
    """What waits of one parameter's Jacobian: parts, or its blocks where these are less."""

    cells: list[tuple[int, slice, slice, list[Part]]] = field(default_factory=list)
    """Parts of some rows of an output leaf, of some samples."""
    blocks: Leaves = ()
    nbytes: int = 0
    """The bytes that all this keeps."""
    _memories: set[int] = field(default_factory=set)

    def add(self, cell: Cell, number: int) -> None:
        """Hold the parts of parameter ``number``."""
        parts = cell.parts[number]
        self.cells.append((cell.leaf, cell.samples, cell.rows, parts))
        if self.blocks:
            self.into(self.blocks)
            return
        for key, nbytes in _storages(parts).items():
            self.nbytes += nbytes if key not in self._memories else 0
            self._memories.add(key)

    def into(self, blocks: Leaves) -> None:
        """Hold these blocks from now on, with all parts written into them."""
        self.blocks, self.nbytes = self.written(blocks), sum(block.nbytes for block in blocks)
        self.cells, self._memories = [], set()

    def written(self, blocks: Leaves) -> Leaves:
        """Blocks, with all parts written into them."""
        for leaf, samples, rows, parts in self.cells:
            write(parts, blocks[leaf][samples, rows])
        return blocks


def _storages(parts: list[Part]) -> dict[int, int]:
    """The bytes of each storage that parts keep, by a number of it."""
    tensors = [x for part in parts for x in vars(part.form).values() if isinstance(x, Tensor)]
    return {memory_of(x): x.untyped_storage().nbytes() for x in tensors}


class ParameterBlocks:
    """The blocks of one parameter after the other; parts of those that follow are held meanwhile.

    One sweep of all rows serves as many parameters as there is room for. Without a budget all
    samples are evaluated once; with one, as many at a time as fit, and anew for each sweep.

    Args:
        chunk: rows that are pulled back at once.
    """

    def __init__(self, call: StreamedCall, shapes: Shapes, chunk: int | None) -> None:
        self._call, self._shapes, self._chunk = call, shapes, chunk
        self.sizes = [call.size * shapes.nbytes(n) for n in range(len(shapes.params))]
        self._held: dict[int, HeldParts] = {}
        self._paged = self._room = 0
        call.budget.room(self._beside(0))
        left = call.budget.beside(PAGED * max(self.sizes, default=0))
        if left is None or left > 0:
            self._keep_pages()

    def _keep_pages(self) -> None:
        """Have pages for blocks of each size, or those of one size would go for those of the next.

        Pages serve what is larger than half of them, so they take no more than two largest blocks.
        """
        places, last = list[Leaves](), sys.maxsize
        for number in sorted(range(len(self.sizes)), key=self.sizes.__getitem__, reverse=True):
            nbytes = self.sizes[number]
            if least_paged() <= nbytes <= last // 2 and not self._shapes.params[number].is_cuda:
                places.append(self._blocks(number))
                last = nbytes
        self._paged = sum(block.nbytes for blocks in places for block in blocks)

    def _beside(self, number: int) -> int:
        """The most bytes of a block from this one on, with the one before: a loop still has it."""
        pairs = pairwise([0, *self.sizes][number:])
        return max((self._paged, *map(sum, pairs)))

    def of(self, number: int) -> Leaves:
        """The blocks of a parameter, ``[B, M, *param]`` for each output leaf."""
        held = self._held.pop(number, None)
        if held is not None:
            return held.written(held.blocks or self._blocks(number))
        blocks = self._blocks(number)
        self._sweep(number, blocks)
        return blocks

    def _blocks(self, number: int) -> Leaves:
        """Places for the blocks of a parameter."""
        size, outputs = self._call.size, enumerate(self._shapes.outputs)
        return tuple(self._shapes.place(i, number, size, out.numel()) for i, out in outputs)

    def _sweep(self, number: int, blocks: Leaves) -> None:
        """Fill the blocks of a parameter by a sweep that holds parts of those that follow."""
        self._held = {later: HeldParts() for later in range(number + 1, len(self.sizes))}
        budget, beside = self._call.budget, self._beside(number)
        left = budget.beside(beside)
        self._room = self._room_of_open() if left is None else max(0, left // 2)
        chunk: int | FittedChunks | None = self._chunk
        if not (left is None or self._call.is_grouped):
            chunk = FittedChunks(max(1, left // 2), self._chunk)

        def work(samples: slice, held: HeldSamples) -> None:
            def fill(cell: Cell) -> None:
                write(cell.parts[number], blocks[cell.leaf][samples, cell.rows])
                self._hold(cell, held.size)

            for leaf in range(len(blocks)):
                held.sweep(leaf, chunk, fill, samples)

        for _ in self._call.groups(work, beside, lambda: self._room):
            if left is not None:  # what one sample takes must be left
                taken = self._room - self._spare()
                self._room = max(0, min(left // 2, left - (budget.counted - taken)))
                self._keep_to_room()

    def _spare(self) -> int:
        """Bytes that may still be held."""
        return self._room - sum(held.nbytes for held in self._held.values())

    def _room_of_open(self) -> int:
        """Bytes that may be held for later blocks where there is no budget."""
        samples = self._call.every
        if samples.factor_bytes <= MODEST_BYTES:
            return MODEST_BYTES
        return max(MODEST_BYTES, free_bytes(self._shapes.params[0].device) // HELD_SHARE)

    def _hold(self, cell: Cell, size: int) -> None:
        """Hold parts of the parameters that follow; the last of them go where room is short.

        Where the parts of a cell take more than its rows, the blocks are held.
        """
        for number in tuple(self._held):
            if number not in self._held:
                return
            held, param = self._held[number], self._shapes.params[number]
            before, is_written = held.nbytes, bool(held.blocks)
            held.add(cell, number)
            shape = (size, cell.rows.stop - cell.rows.start, *param.shape)
            rows = prod(shape) * self._shapes.dtype(cell.leaf, number).itemsize
            if not is_written and held.nbytes - before > rows:
                while number in self._held and self._spare() + held.nbytes < self.sizes[number]:
                    self._held.popitem()
                if number in self._held:
                    held.into(self._blocks(number))
            self._keep_to_room()

    def _keep_to_room(self) -> None:
        while self._held and self._spare() < 0:
            self._held.popitem()
