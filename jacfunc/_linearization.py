"""What an evaluation leaves behind: outputs, and how cotangents are pulled back from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jacfunc._check import Refused, is_out_of_memory
from jacfunc._functorch import inside_transform, sweep_batch
from jacfunc._trail import note
from jacfunc._types import Leaves

EVERY = slice(None)
"""All primals, or all outputs."""


@dataclass(slots=True)
class Linearization:
    """The outputs at a point, and the map that takes their cotangents to those of the primals."""

    outputs: Leaves
    extras: Leaves
    sweep: Callable[[Leaves, slice, slice], Leaves]
    batchable: bool

    def pull(self, cotangents: Leaves, onto: slice = EVERY, of: slice = EVERY) -> Leaves:
        """One cotangent: ``[*out]`` → ``[*in]``, onto some of the primals, of some outputs."""
        return self.sweep(batched_like(cotangents, self.outputs[of]), onto, of)

    def pull_batch(self, cotangents: Leaves, onto: slice = EVERY, of: slice = EVERY) -> Leaves:
        """K cotangents at once, ``[K, *out]`` → ``[K, *in]``: vmapped where that is right.

        A single one is never vmapped, so that ``chunk_size=1`` is the plain loop of torch.func.
        """
        if not self.batchable:
            return one_by_one(lambda seeds: self.pull(seeds, onto, of), cotangents)
        try:
            if cotangents[0].shape[0] == 1:
                # not batched by the vmaps outside, as the products of larger chunks are not
                return one_by_one(lambda seeds: self.sweep(seeds, onto, of), cotangents)
            products, _ = sweep_batch(lambda seeds: (self.sweep(seeds, onto, of), ()), cotangents)
        except Exception as error:  # a backward pass of the user's own may raise anything
            if isinstance(error, Refused) or is_out_of_memory(error):
                raise
            note("the backward pass could not be batched, rows go one by one: %s", error)
            return one_by_one(lambda seeds: self.pull(seeds, onto, of), cotangents)
        return products


def one_by_one(sweep: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
    """K seeds ``[K, *shape]`` swept one after the other, without vmap."""
    products = [sweep(tuple(seed[k] for seed in seeds)) for k in range(seeds[0].shape[0])]
    return tuple(torch.stack(leaf) for leaf in zip(*products, strict=True))


def batched_like(seeds: Leaves, leaves: Leaves) -> Leaves:
    """Seeds as they are, but batched by the vmaps outside wherever their leaves are.

    Torch may write into them, or into zeros like them, and can't write what is batched into what
    is not. Chunks of seeds go without at first: it makes every seed as large as the batch.
    """
    if not inside_transform():
        return seeds
    return tuple(seed + torch.zeros_like(leaf) for seed, leaf in zip(seeds, leaves, strict=True))
