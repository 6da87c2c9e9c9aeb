"""What an evaluation leaves behind: outputs, and how cotangents are pulled back from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._faults import can_be_pushed, handled
from jacfunc._linear_map.seeded import LinearMap, is_followed
from jacfunc._log import note
from jacfunc._torch import below_vmap, inside_transform, newer_transforms, sweep_batch
from jacfunc._types import Leaves

EVERY = slice(None)
"""All primals, or all outputs."""

Some: TypeAlias = slice | Sequence[int]
"""Numbers of some leaves, in order."""


def some_of(leaves: Leaves, of: Some) -> Leaves:
    """Those leaves."""
    return leaves[of] if isinstance(of, slice) else tuple([leaves[number] for number in of])


def live(cotangents: Leaves) -> Some:
    """Numbers of those that are not zero everywhere: 0 · ∞ of the others would spoil products.

    A single one is not looked at.
    """
    if len(cotangents) == 1:
        return EVERY
    return [number for number, seeds in enumerate(cotangents) if seeds.any()]


@dataclass(slots=True)
class Linearization:
    """The outputs at a point, and the map that takes their cotangents to those of the primals."""

    outputs: Leaves
    extras: Leaves
    sweep: Callable[[Leaves, slice, Some], Leaves]
    batchable: bool
    names: Set[str] = frozenset()
    """Of the autograd nodes."""
    depth: int = 0
    """How many transforms were active."""
    differentiated: bool = True
    """Is the graph of a sweep kept where grad mode is on?"""
    transpose: Callable[[], Linearization] | None = None
    """Makes the map of tangents, if sweeps are of a plain graph."""
    _transposed: Linearization | None = None

    def pull(self, cotangents: Leaves, onto: slice = EVERY, of: Some = EVERY) -> Leaves:
        """One cotangent: ``[*out]`` → ``[*in]``, onto some of the primals, of some outputs.

        It may be one that a transform, or plain autograd, differentiates by.
        """
        if self.transpose is not None:
            if not is_followed(cotangents):
                return self.sweep(cotangents, onto, of)
            if not (self.differentiated and torch.is_grad_enabled()):
                return self._as_map()(spread(cotangents, self.outputs, of))[onto]
        newer = newer_transforms(self.depth)
        if "Jvp" in newer and not can_be_pushed(self.names):
            raise Refused(
                "torch's forward mode through its backward pass is wrong; use reverse mode"
            )
        if "Vmap" in newer and not self.batchable:
            return below_vmap(
                partial(one_by_one, lambda seeds: self.pull(seeds, onto, of)), cotangents
            )
        return self.sweep(batched_like(cotangents, some_of(self.outputs, of)), onto, of)

    def _as_map(self) -> LinearMap:
        """For whoever differentiates by cotangents alone; nothing else is known to its graph."""
        sweep = self.sweep
        return LinearMap(lambda u: sweep(u, EVERY, EVERY), self.pull_batch, self._map_of_tangents)

    def _map_of_tangents(self) -> LinearMap:
        if self._transposed is None:
            assert self.transpose is not None
            try:
                self._transposed = self.transpose()
            except RuntimeError as error:
                raise Refused(
                    "vjp: the pullback must be a differentiable function of its cotangent, got a "
                    f"backward pass that is none: {str(error).rstrip('.')}. Use forward mode, or "
                    "write func in other operations."
                ) from error
        sweep, sweep_batch = self._transposed.sweep, self._transposed.pull_batch
        return LinearMap(lambda v: sweep(v, EVERY, EVERY), sweep_batch, self._as_map)

    def pull_batch(self, cotangents: Leaves, onto: slice = EVERY, of: Some = EVERY) -> Leaves:
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
            handled(error)
            note("the backward pass could not be batched, rows go one by one: %s", error)
            return one_by_one(lambda seeds: self.pull(seeds, onto, of), cotangents)
        return products


def spread(cotangents: Leaves, outputs: Leaves, of: Some) -> Leaves:
    """Cotangents of some outputs as cotangents of all, zero for the others."""
    every = [torch.zeros_like(out) for out in outputs]
    numbers = range(len(every))[of] if isinstance(of, slice) else of
    for number, cotangent in zip(numbers, cotangents, strict=True):
        every[number] = cotangent
    return tuple(every)


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
