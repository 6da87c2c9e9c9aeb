"""Samples of a batch: taken in chunks, one alone, or all at once under vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._memory import Chunk, in_chunks
from jacfunc._torch import sweep_batch
from jacfunc._types import LeafFunction, Leaves

Dims: TypeAlias = Sequence[int | None]
"""For each leaf the dimension that holds its samples; None where all samples share it."""


def narrowed(leaves: Leaves, dims: Dims, start: int, stop: int) -> Leaves:
    """The leaves of the samples from start to stop."""
    if start == 0 and stop == batch_size(leaves, dims):
        return leaves
    pairs = zip(leaves, dims, strict=True)
    return tuple(x if d is None else x.narrow(d, start, stop - start) for x, d in pairs)


def sample_chunks(
    take: Callable[[Leaves, Dims], Leaves], leaves: Leaves, dims: Dims, chunk: Chunk
) -> Iterator[Leaves]:
    """What ``take(leaves, dims)`` returns of each chunk of samples."""

    def between(start: int, stop: int) -> Leaves:
        return take(narrowed(leaves, dims, start, stop), dims)

    return in_chunks(batch_size(leaves, dims), chunk, between)


def batch_size(leaves: Leaves, dims: Dims) -> int:
    """How many samples there are; one where no leaf holds samples."""
    pairs = zip(leaves, dims, strict=True)
    return next((x.shape[d] for x, d in pairs if d is not None), 1)


def one_sample(leaves: Leaves, dims: Dims, number: int) -> Leaves:
    """The leaves of one sample, without the dimension of samples, each with its own memory.

    There are zeros for those of an empty batch.
    """
    pairs = zip(leaves, dims, strict=True)
    return tuple(x if d is None else _select(x, d, number) for x, d in pairs)


def _select(leaf: Tensor, dim: int, number: int) -> Tensor:
    if leaf.shape[dim]:
        return leaf.select(dim, number).clone()
    shape = list(leaf.shape)
    del shape[dim]
    return leaf.new_zeros(shape)


SampleFunction: TypeAlias = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]
"""``of_one(params, data) -> (outputs, extras)``: a function of parameters and one sample's data."""


@dataclass(eq=False)
class Samples:
    """Data of a batch, and the dimension in which each leaf holds its samples.

    Where no leaf has such a dimension, the call as a whole is the only sample.

    Args:
        randomness: of random functions under the vmap over samples.
    """

    leaves: Leaves
    dims: Dims
    randomness: str = "same"

    @property
    def is_mapped(self) -> bool:
        """Does a leaf hold samples, so that they need a vmap?"""
        return any(dim is not None for dim in self.dims)

    @cached_property
    def size(self) -> int:
        """How many there are."""
        return batch_size(self.leaves, self.dims)

    def each(self, param: Tensor) -> Tensor:
        """A parameter as ``[B, *param]``, each sample's own."""
        return param.expand(self.size, *param.shape) if self.is_mapped else param.clone()

    def others(self, count: int) -> Iterator[tuple[list[int], Leaves]]:
        """Other batches of these samples, the smaller ones first: numbers, and tensors.

        Args:
            count: how often there were others before; those come from other places then.
        """
        leaves, dims, size = self.leaves, self.dims, self.size
        for number in dict.fromkeys([count % size, size - 1, size // 2]):
            pairs = zip(narrowed(leaves, dims, number, number + 1), dims, strict=True)
            yield [number], tuple(x if dim is None else x.clone() for x, dim in pairs)
        pairs = zip(leaves, dims, strict=True)
        twice = tuple(x if dim is None else torch.cat([x, x], dim) for x, dim in pairs)
        yield [*range(size)] * 2, twice

    def map(
        self,
        of_one: SampleFunction,
        params: Leaves,
        dims: Dims,
    ) -> tuple[Leaves, Leaves]:
        """Outputs and extras ``[B, *shape]`` of all samples; ``dims`` belong to the parameters."""
        count, num_outputs = len(params), 0

        def in_a_row(leaves: Leaves) -> tuple[Leaves, Leaves]:
            nonlocal num_outputs
            outputs, extras = of_one(leaves[:count], leaves[count:])
            num_outputs = len(outputs)
            return (*outputs, *extras), ()

        every = (*params, *self.leaves)
        if self.is_mapped:
            products, _ = sweep_batch(in_a_row, every, self.randomness, (*dims, *self.dims))
        else:
            products = tuple(out.unsqueeze(0) for out in in_a_row(every)[0])
        return products[:num_outputs], products[num_outputs:]

    def with_own_params(
        self, of_one: SampleFunction, params: Leaves
    ) -> tuple[LeafFunction, Leaves]:
        """A function of all samples at parameters ``[B, *param]``, and these parameters.

        Each sample has parameters of its own, so that one cotangent serves all samples.
        """

        def of_all(*own: Tensor) -> tuple[Leaves, Leaves]:
            return self.map(of_one, own, [0] * len(own))

        return of_all, tuple(map(self.each, params))
