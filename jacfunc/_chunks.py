"""A range taken in chunks: of a fixed size, or as large as memory lets them be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from jacfunc._check import is_out_of_memory
from jacfunc._counting import PeakBytes
from jacfunc._trail import note
from jacfunc._types import Leaves

FIRST = 2
"""A single seed is not vmapped, and would not tell what vmapped ones take."""

GROWTH = 1.25
"""Chunks that could grow by less stay as they are."""


@dataclass(frozen=True)
class Within:
    """Chunks whose work, counted as it runs, stays within ``room`` bytes.

    The first chunk is small. Where k seeds take b bytes, n·k seeds take at most n·b, so the next
    may be larger by room / b; after two or three the size is settled, and no longer counted.
    """

    room: int
    at_most: int | None = None


Chunk: TypeAlias = int | Within | None
"""Seeds (or samples) at once; None for all."""


def largest(chunk: Chunk, total: int) -> int:
    """The most seeds of one sweep."""
    size = chunk.at_most if isinstance(chunk, Within) else chunk
    return max(1, min(size or total, total))


def in_chunks(total: int, chunk: Chunk, take: Callable[[int, int], Leaves]) -> Iterator[Leaves]:
    """``take(start, stop)`` of consecutive ranges; an empty range is taken once, as it is.

    Out of memory, the chunk is halved and taken again; what was yielded before stays.
    """
    most, start = largest(chunk, total), 0
    within = chunk if isinstance(chunk, Within) and not torch.compiler.is_compiling() else None
    step = min(FIRST, most) if within else most
    while start < max(total, 1):
        stop = min(start + step, total)
        try:
            if within is None:
                yield take(start, stop)
            else:
                with PeakBytes() as counter:
                    taken = take(start, stop)
                yield taken
                del taken  # or it would stay beside the next chunk
        except RuntimeError as error:
            if stop - start <= 1 or not is_out_of_memory(error):
                raise
            step, within = (stop - start) // 2, None
            note("out of memory with %d seeds at once, goes on with %d", stop - start, step)
            continue
        start = max(stop, 1)
        if within:
            fitting = min(most, max(1, int(step * within.room / max(counter.peak, 1))))
            if fitting == 1 or step <= fitting <= GROWTH * step:
                within = None
            step = fitting
