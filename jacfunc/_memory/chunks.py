"""A range taken in chunks: of a fixed size, or as large as memory lets them be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch

from jacfunc._errors import is_out_of_memory
from jacfunc._log import note
from jacfunc._memory.counting import PeakBytes
from jacfunc._types import Leaves

GROWTH = 1.25
"""Chunks that could grow by less stay as they are."""

ROUND = 16
"""Products of so many vectors, or twice as many, are faster than of one more."""


Take: TypeAlias = Callable[[int, int], Leaves]
"""Products of the seeds from start to stop."""


@dataclass(frozen=True)
class FittedChunks:
    """Chunks whose work, counted as it runs, stays within ``room`` bytes.

    The first chunk is small. Where k seeds take b bytes, n·k seeds take at most n·b, so the next
    may be larger by room / b; after two or three the size is settled, and no longer counted: not
    in this sweep, nor in later ones, which must be of the same kind.
    """

    first: ClassVar[int] = 2  # a single seed is not vmapped, and would not tell what others take

    room: int
    at_most: int | None = None
    settled: list[int] = field(default_factory=list, repr=False, compare=False)
    leaves: dict[int, FittedChunks] = field(default_factory=dict, repr=False, compare=False)
    """By number of the output leaf, of which each has sweeps of a kind of its own."""

    def counted(self, take: Take, start: int, stop: int) -> tuple[Leaves, int]:
        """A chunk, and the bytes that its work took."""
        with PeakBytes() as counter:
            taken = take(start, stop)
        return taken, counter.peak

    def next(self, size: int, peak: int, most: int) -> int:
        """The chunk after one of this size that took so much."""
        fitting = min(most, max(1, int(size * self.room / max(peak, 1))))
        if ROUND <= fitting < most:
            fitting -= fitting % ROUND
        if fitting in (1, most) or size <= fitting <= GROWTH * size:
            self.settled.append(fitting)
        return fitting


class Pieces(FittedChunks):
    """Chunks whose products go elsewhere at once: few bytes, or a small share of all products."""

    first = 1

    def next(self, size: int, peak: int, most: int) -> int:
        """An eighth of all, if that is more than the room."""
        share = FittedChunks(max(self.room, peak * most // (8 * size)), settled=self.settled)
        return share.next(size, peak, most)

    def counted(self, take: Take, start: int, stop: int) -> tuple[Leaves, int]:
        """A chunk, and the bytes of its products."""
        taken = take(start, stop)
        return taken, sum(product.nbytes for product in taken)


Chunk: TypeAlias = int | FittedChunks | None
"""Seeds (or samples) at once; None for all."""


def of_leaf(chunk: Chunk, number: int) -> Chunk:
    """The chunk for sweeps through one output leaf alone: the first shares it with others."""
    if number == 0 or not isinstance(chunk, FittedChunks):
        return chunk
    return chunk.leaves.setdefault(number, replace(chunk, settled=[], leaves={}))


def largest(chunk: Chunk, total: int) -> int:
    """The most seeds of one sweep."""
    size = chunk.at_most if isinstance(chunk, FittedChunks) else chunk
    return max(1, min(size or total, total))


def evenly(total: int, each: int, most: int) -> int:
    """How many of ``each`` bytes to take at once, for chunks of the same size below the most."""
    chunks = -(-total * each // most)
    return -(-total // max(1, chunks))


def in_chunks(total: int, chunk: Chunk, take: Take) -> Iterator[Leaves]:
    """``take(start, stop)`` of consecutive ranges; an empty range is taken once, as it is.

    Out of memory, the chunk is halved and taken again; what was yielded before stays.
    """
    within = (
        chunk if isinstance(chunk, FittedChunks) and not torch.compiler.is_compiling() else None
    )
    most, start = largest(chunk, total), 0
    step = most if within is None else within.settled[-1] if within.settled else within.first
    while start < max(total, 1):
        stop = min(start + step, total)
        counting = within if within is not None and not within.settled else None
        try:
            taken, took = (
                counting.counted(take, start, stop) if counting else (take(start, stop), 0)
            )
            yield taken
            del taken  # or it would stay beside the next chunk
        except RuntimeError as error:
            if stop - start <= 1 or not is_out_of_memory(error):
                raise
            step = (stop - start) // 2
            note("out of memory with %d seeds at once, goes on with %d", stop - start, step)
            continue
        if counting is not None:
            step = counting.next(stop - start, took, most)
        start = max(stop, 1)
