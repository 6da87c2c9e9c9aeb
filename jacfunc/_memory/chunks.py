"""Ranges of seeds or samples, taken in chunks of a fixed size, or as large as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from jacfunc._errors import is_out_of_memory
from jacfunc._log import note
from jacfunc._memory.counting import PeakBytes
from jacfunc._memory.heap import give_back
from jacfunc._types import Leaves

GROWTH = 1.25
"""A chunk that could grow by less than this factor stays as it is."""

ROUND = 16
"""Products of 16 vectors, or a multiple, are faster than products of one more."""

SHARE = 8
"""Chunks that are copied elsewhere, and blocks of a stream, may have up to an eighth of all."""

Take: TypeAlias = Callable[[int, int], Leaves]
"""Products of the seeds from ``start`` to ``stop``."""


@dataclass(frozen=True)
class FittedChunks:
    """Chunks that grow until the bytes they take, counted as they run, fill ``room``.

    The first chunk is small. Where k seeds take b bytes, n·k seeds take at most n·b, so the next
    chunk may be larger by room / b. After two or three chunks the size is settled, and nothing is
    counted any longer, neither in this sweep nor in later ones, which must be of the same kind.

    Args:
        room: bytes that the work on a chunk may take.
        at_most: seeds of a chunk; None for no limit.
        counts_products: count the products of a chunk alone, not the work: see :meth:`by_share`.
    """

    room: int
    at_most: int | None = None
    counts_products: bool = False
    settled: list[int] = field(default_factory=list, repr=False, compare=False)
    """Holds the size, once it is settled."""
    by_leaf: dict[int, FittedChunks] = field(default_factory=dict, repr=False, compare=False)
    """The chunks of other output leaves, by number, as sweeps of each leaf take other memory."""

    @classmethod
    def by_share(cls, room: int) -> FittedChunks:
        """Chunks whose products are copied elsewhere at once.

        The products of a chunk take few bytes, or a small share of those of all chunks.
        """
        return cls(room, counts_products=True)

    def anew(self) -> FittedChunks:
        """Chunks for sweeps of another kind, of which nothing is settled."""
        return replace(self, settled=[], by_leaf={})

    @property
    def first(self) -> int:
        """The size of the first chunk: a single seed is not vmapped, so its work tells nothing."""
        return 1 if self.counts_products else 2

    def counted(self, take: Take, start: int, stop: int) -> tuple[Leaves, int]:
        """The products of a chunk, and the bytes that count."""
        if self.counts_products:
            products = take(start, stop)
            return products, sum(product.nbytes for product in products)
        give_back()  # what was learned before the first chunk
        with PeakBytes() as counter:
            products = take(start, stop)
        give_back()  # before the result is allocated, and the next chunk, which is larger
        return products, counter.peak

    def next(self, size: int, nbytes: int, most: int, is_first: bool = False) -> int:
        """The size of the chunk after one of this size, which took so many bytes.

        With the first of all chunks may be counted what is done once, such as the result itself:
        it never makes the next one smaller.
        """
        room = self.room
        if self.counts_products:
            room = max(room, nbytes * most // (SHARE * max(size, 1)))
        fitting = min(most, max(1, int(size * room / max(nbytes, 1))))
        if is_first and fitting <= size < most and not self.counts_products:
            return size
        if ROUND <= fitting < most:
            fitting -= fitting % ROUND
        if fitting in (1, most) or size <= fitting <= GROWTH * size:
            self.settled.append(fitting)
        return fitting


Chunk: TypeAlias = int | FittedChunks | None
"""How many seeds or samples are taken at once; None for all."""


def of_leaf(chunk: Chunk, number: int) -> Chunk:
    """The chunk for sweeps through one output leaf; the first leaf has that of all leaves."""
    if number == 0 or not isinstance(chunk, FittedChunks):
        return chunk
    return chunk.by_leaf.setdefault(number, chunk.anew())


def largest(chunk: Chunk, total: int) -> int:
    """The most seeds that one sweep may have."""
    size = chunk.at_most if isinstance(chunk, FittedChunks) else chunk
    return max(1, min(size or total, total))


def evenly(total: int, each: int, most: int) -> int:
    """The size of even chunks of ``total`` items of ``each`` bytes, within ``most`` bytes."""
    chunks = -(-total * each // most)
    return -(-total // max(1, chunks))


def in_chunks(total: int, chunk: Chunk, take: Take) -> Iterator[Leaves]:
    """``take(start, stop)`` of consecutive ranges; an empty range is taken once, as it is.

    Out of memory, the chunk is halved and taken again; what was yielded before stays.
    """
    fitted = (
        chunk if isinstance(chunk, FittedChunks) and not torch.compiler.is_compiling() else None
    )
    most, start = largest(chunk, total), 0
    step = most
    if fitted is not None:
        step = min(most, fitted.settled[-1] if fitted.settled else fitted.first)
    while start < max(total, 1):
        stop = min(start + step, total)
        counting = fitted if fitted is not None and not fitted.settled else None
        try:
            products, nbytes = (
                counting.counted(take, start, stop) if counting else (take(start, stop), 0)
            )
            yield products
            del products  # or they would stay beside the next chunk
        except RuntimeError as error:
            if stop - start <= 1 or not is_out_of_memory(error):
                raise
            step = (stop - start) // 2
            note("out of memory with %d seeds at once, goes on with %d", stop - start, step)
            continue
        if counting is not None:
            step = counting.next(stop - start, nbytes, most, is_first=start == 0)
        start = max(stop, 1)
