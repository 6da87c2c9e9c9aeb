"""Tensors of a batch, and the dimension in which each holds its samples, if it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from jacfunc._memory import Chunk, in_chunks
from jacfunc._types import Leaves

Dims: TypeAlias = Sequence[int | None]


def narrowed(leaves: Leaves, dims: Sequence[int | None], start: int, stop: int) -> Leaves:
    """The samples from start to stop."""
    return tuple(
        x if d is None or (start, stop) == (0, x.shape[d]) else x.narrow(d, start, stop - start)
        for x, d in zip(leaves, dims, strict=True)
    )


def sample_chunks(
    take: Callable[[Leaves, Dims], Leaves], leaves: Leaves, dims: Dims, chunk: Chunk
) -> Iterator[Leaves]:
    """``take`` of the samples, a chunk at a time."""

    def between(start: int, stop: int) -> Leaves:
        return take(narrowed(leaves, dims, start, stop), dims)

    return in_chunks(batch_size(leaves, dims), chunk, between)


def batch_size(leaves: Leaves, dims: Dims) -> int:
    """How many samples there are."""
    return next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)


def one_sample(leaves: Leaves, dims: Dims, number: int) -> Leaves:
    """The leaves of one sample; what all share as it is."""
    pairs = zip(leaves, dims, strict=True)
    return tuple(x if d is None else x.select(d, number) for x, d in pairs)
