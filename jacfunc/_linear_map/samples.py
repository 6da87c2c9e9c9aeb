"""Tensors of a batch, and the dimension in which each holds its samples, if it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from jacfunc._memory import Chunk, in_chunks
from jacfunc._torch import sweep_batch
from jacfunc._types import LeafFunction, Leaves

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


OnLeaves: TypeAlias = Callable[[Leaves], tuple[Leaves, Leaves]]


OfOne: TypeAlias = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]
"""``of_one(params, data) -> (outputs, extras)`` of a single sample."""


@dataclass(frozen=True)
class Samples:
    """Tensors of a batch, and the dimension in which each holds its samples, if it does.

    Without any such dimension the call as a whole is the only sample.
    """

    leaves: Leaves
    dims: Sequence[int | None]
    randomness: str = "same"

    @property
    def is_mapped(self) -> bool:
        """Are there samples, rather than one call?"""
        return any(dim is not None for dim in self.dims)

    @property
    def size(self) -> int:
        """How many there are."""
        sizes = (x.shape[d] for x, d in zip(self.leaves, self.dims, strict=True) if d is not None)
        return next(sizes, 1)

    def each(self, param: Tensor) -> Tensor:
        """A parameter as one of each sample."""
        return param.expand(self.size, *param.shape) if self.is_mapped else param.clone()

    def map(
        self,
        of_one: OfOne,
        params: Leaves,
        dims: Sequence[int | None],
    ) -> tuple[Leaves, Leaves]:
        """``of_one(params, leaves)`` of all samples: outputs and extras as ``[B, *shape]``."""
        count, num_outputs = len(params), 0

        def in_a_row(leaves: Leaves) -> tuple[Leaves, Leaves]:
            nonlocal num_outputs
            outputs, extras = of_one(leaves[:count], leaves[count:])
            num_outputs = len(outputs)
            return (*outputs, *extras), ()

        every = (*params, *self.leaves)
        if self.is_mapped:
            found, _ = sweep_batch(in_a_row, every, self.randomness, (*dims, *self.dims))
        else:
            found = tuple(out.unsqueeze(0) for out in in_a_row(every)[0])
        return found[:num_outputs], found[num_outputs:]

    def apart(self, of_one: OfOne, params: Leaves) -> tuple[LeafFunction, Leaves]:
        """All samples as a function of parameters ``[B, *param]``, each sample's own, and these:
        one cotangent then serves all samples.
        """

        def of_all(*own: Tensor) -> tuple[Leaves, Leaves]:
            return self.map(of_one, own, [0] * len(own))

        return of_all, tuple(map(self.each, params))
