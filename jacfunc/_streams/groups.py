"""Jacobians of some samples after the other, of which more may be evaluated at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from jacfunc._memory import MODEST_BYTES
from jacfunc._modules import FEW_CALLS
from jacfunc._streams.held import Cell, HeldSamples
from jacfunc._streams.streamed import StreamedCall
from jacfunc._types import Leaves, Tree

GRAPH = 4
"""The graph of an evaluation keeps about as much as the cotangents of four rows."""


class SampleGroups:
    """Groups of samples that are evaluated together, from which blocks of samples are written."""

    def __init__(self, call: StreamedCall) -> None:
        self._call = call
        self._group: SampleGroup | None = None
        self._fitting = 0
        """How many samples may be evaluated at once, and held, where that is more than a block."""

    def begin(self) -> int:
        """Evaluate the first group, and say how many samples a block has: at most what fits.

        What fits is a guess at the first call of a kind, and what that has shown at later ones.
        """
        call, known = self._call, self._call.known_bytes()
        guess = FEW_CALLS if known is None else _fitting(known)
        group = SampleGroup(0, call.between(0, min(guess, call.size)))
        self._fitting = _fitting(group.bytes_of_one)
        call.learn_bytes(group.bytes_of_one)
        size = call.budget.chunk(None, call.size, group.samples.shapes.sample_bytes)
        assert isinstance(size, int)
        if group.samples.size <= self._fitting:
            call.go_on()
            self._group = group
        return min(size, self._fitting)

    def of(self, start: int, stop: int) -> Leaves:
        """All rows ``[B, M, *param]`` of the samples from start to stop, leaf after leaf."""
        if self._group is None or not self._group.holds(start, stop):
            self._group = None  # or its graph would stay beside the next one
            end = max(stop, min(start + self._fitting, self._call.size))
            self._group = SampleGroup(start, self._call.between(start, end))
            self._call.go_on()
        return self._group.rows(start, stop)

    def tree(self, rows: Sequence[Tensor]) -> Tree:
        """What module_jacobian returns for these samples."""
        assert self._group is not None
        width, blocks = len(self._call.names), []
        for number, out in enumerate(self._group.samples.outputs):
            of_leaf = rows[number * width : (number + 1) * width]
            blocks.append(self._call.by_name([self._call.shaped(x, out) for x in of_leaf]))
        return self._call.output_tree(blocks)


def _fitting(bytes_of_one: int) -> int:
    return max(1, MODEST_BYTES // max(1, bytes_of_one))


@dataclass
class SampleGroup:
    """Consecutive samples that were evaluated; ``start`` is the number of the first."""

    start: int
    samples: HeldSamples
    _cells: list[Cell] = field(default_factory=list)

    def holds(self, start: int, stop: int) -> bool:
        """Are these samples among them?"""
        return self.start <= start and stop <= self.start + self.samples.size

    @property
    def bytes_of_one(self) -> int:
        """About the bytes that are kept of a sample: its graph, and factors of all rows."""
        samples = self.samples
        return (samples.factor_bytes + GRAPH * samples.factors.nbytes) // max(1, samples.size)

    def rows(self, start: int, stop: int) -> Leaves:
        """All rows ``[B, M, *param]`` of some samples, for one output leaf after the other."""
        samples, leaves = self.samples, range(len(self.samples.outputs))
        if stop - start == samples.size:
            return tuple(rows for leaf in leaves for rows in samples.all_rows(leaf))
        if not self._cells:  # one sweep serves all samples of the group
            for leaf in leaves:
                samples.sweep(leaf, None, self._cells.append)
        size, some = stop - start, slice(start - self.start, stop - self.start)
        outputs, places = enumerate(samples.outputs), samples.shapes.places
        every = [places(i, size, out.numel()) for i, out in outputs]
        for cell in self._cells:
            blocks = [block[:, cell.rows] for block in every[cell.leaf]]
            samples.factors.write(cell.of(some, cell.rows), blocks)
        return tuple(block for blocks in every for block in blocks)
