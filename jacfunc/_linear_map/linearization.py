"""A function that was evaluated at a point: its outputs, and the pullback of their cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._faults import can_be_pushed, handled
from jacfunc._linear_map.seeded import FEW_NUMBERS, LinearMap, is_followed, one_by_one
from jacfunc._log import note
from jacfunc._torch import (
    below_vmap,
    dtypes_of,
    inside_transform,
    newer_transforms,
    nodes_behind,
    sweep_batch,
)
from jacfunc._traces import can_take_rows, own_nodes, taking_rows
from jacfunc._types import Leaves

EVERY = slice(None)
"""All primals, or all outputs."""

LeafNumbers: TypeAlias = slice | Sequence[int]
"""Which leaves of a tuple are meant: a slice, or their numbers in order."""


Pulling: TypeAlias = Callable[[Leaves], Leaves]
"""Pulls one cotangent after the other back in the same way."""


def chosen_leaves(leaves: Leaves, numbers: LeafNumbers) -> Leaves:
    """The leaves with these numbers."""
    if isinstance(numbers, slice):
        return leaves[numbers]
    return tuple([leaves[number] for number in numbers])


def nonzero_numbers(cotangents: Leaves) -> LeafNumbers:
    """Numbers of the cotangents that are not zero everywhere.

    The others are left out, as 0 · ∞ would spoil products. A single cotangent is not looked at, nor
    are those of a compiler, which reads no numbers.
    """
    if len(cotangents) == 1 or torch.compiler.is_compiling():
        return EVERY
    return [number for number, seeds in enumerate(cotangents) if seeds.any()]


class PlainGraph(Protocol):
    """A plain graph of autograd."""

    @property
    def outputs(self) -> Leaves:
        """The tensors that it ends at."""

    @property
    def as_evaluated(self) -> Callable[[], None] | None:
        """Puts a module back as it was, before code of a user's runs in a pullback."""


@dataclass(slots=True)
class Linearization:
    """Outputs at a point, and the linear map from their cotangents to those of the primals.

    Args:
        outputs: differentiable leaves of what the function returned.
        extras: other tensors that it returned.
        sweep: makes what pulls back onto a slice of the primals, from outputs with these numbers.
        is_batchable: is a sweep right under vmap? False once that has failed.
        node_names: of the autograd nodes between primals and outputs.
        num_transforms: how many transforms were active when it was evaluated.
        keeps_graph: do products of a sweep carry a graph where grad mode is on?
        transpose: makes the map of tangents, and compares it with this one, unless it is called
            with False; None where sweeps are not of a plain graph.
        last: the sweep that frees a plain graph.
        plain: the plain graph, and what a pullback calls first; None where there is none.
        splits: do nodes of a user's own take rows one by one in a sweep under vmap, as one has
            refused all at once?
    """

    outputs: Leaves
    extras: Leaves
    sweep: Callable[[slice, LeafNumbers], Pulling]
    is_batchable: bool
    node_names: Set[str] = frozenset()
    num_transforms: int = 0
    keeps_graph: bool = True
    transpose: Callable[..., Linearization] | None = None
    last: Callable[[slice, LeafNumbers], Pulling] | None = None
    plain: PlainGraph | None = None
    splits: bool = False
    _transposed: Linearization | None = None

    def pull(self, cotangents: Leaves, onto: slice = EVERY, of: LeafNumbers = EVERY) -> Leaves:
        """One cotangent ``of`` some outputs, pulled back onto some primals: ``[*out]`` → ``[*in]``.

        A transform, or plain autograd, may differentiate by the cotangent.
        """
        if self.transpose is not None:
            if not is_followed(cotangents):
                return self.sweep(onto, of)(cotangents)
            if not (self.keeps_graph and torch.is_grad_enabled()):
                return self._as_map()(spread(cotangents, self.outputs, of))[onto]
        newer = newer_transforms(self.num_transforms)
        if "Jvp" in newer and not can_be_pushed(self.node_names):
            raise Refused(
                "torch's forward mode through its backward pass is wrong; use reverse mode"
            )
        if "Vmap" in newer and (self.splits or not self.is_batchable):
            return below_vmap(
                partial(one_by_one, lambda seeds: self.pull(seeds, onto, of)), cotangents
            )
        return self.sweep(onto, of)(batched_like(cotangents, chosen_leaves(self.outputs, of)))

    def pull_last(self, cotangents: Leaves, onto: slice = EVERY, of: LeafNumbers = EVERY) -> Leaves:
        """:meth:`pull`, after which nothing is pulled back: the graph is freed on the way."""
        is_kept = is_followed(cotangents) or (self.keeps_graph and torch.is_grad_enabled())
        if self.last is None or is_kept:
            return self.pull(cotangents, onto, of)
        return self.last(onto, of)(cotangents)

    def _as_map(self) -> LinearMap:
        """The pullback as a map that is differentiated by cotangents alone, not by the primals."""
        sweep = self.sweep
        return LinearMap(lambda u: sweep(EVERY, EVERY)(u), self.pull_batch, self._map_of_tangents)

    def transposed(self) -> Linearization:
        """The map of tangents, by the graph of a pullback, which is kept.

        Raises:
            Refused: if the backward pass is no differentiable function of its cotangent.
        """
        if self._transposed is None:
            assert self.transpose is not None
            try:
                self._transposed = self.transpose()
            except RuntimeError as error:
                raise Refused(
                    "the pullback must be a differentiable function of its cotangent, got a "
                    f"backward pass that is none: {str(error).rstrip('.')}. Use forward mode, or "
                    "write func in other operations."
                ) from error
        return self._transposed

    def dtypes(self) -> set[torch.dtype]:
        """Those in which a plain graph computes, that of autocast inside of a function, too."""
        outputs = self.plain.outputs if self.plain else ()
        nodes = nodes_behind([out.grad_fn for out in outputs])
        return set(chain.from_iterable(map(dtypes_of, nodes)))

    def _map_of_tangents(self) -> LinearMap:
        try:
            transposed = self.transposed()
        except Refused as refusal:  # autograd may call this later, outside of every public function
            raise Refused(f"vjp: {refusal}") from refusal
        return LinearMap(
            lambda v: transposed.sweep(EVERY, EVERY)(v), transposed.pull_batch, self._as_map
        )

    def pull_batch(
        self, cotangents: Leaves, onto: slice = EVERY, of: LeafNumbers = EVERY
    ) -> Leaves:
        """K cotangents pulled back, ``[K, *out]`` → ``[K, *in]``: under vmap where that is right.

        A single cotangent never is under vmap, so that ``chunk_size=1`` is the loop of torch.func.
        """
        while self.is_batchable:
            own = self._own_nodes(cotangents) if self.splits else ()
            if own is None:
                break
            try:
                if cotangents[0].shape[0] == 1:
                    # the vmaps outside do not batch the seeds of larger chunks either
                    return one_by_one(self.sweep(onto, of), cotangents)
                each = tuple(map(_in_rows, cotangents))
                pull: Any = lambda seeds: (self.sweep(onto, of)(seeds), ())  # noqa: E731
                if not (own and self.plain):
                    return sweep_batch(pull, each)[0]
                with taking_rows(own, self.plain.as_evaluated):
                    return sweep_batch(pull, each)[0]
            except Exception as error:  # a backward pass of the user's own may raise anything
                if isinstance(error, Refused) or is_out_of_memory(error):
                    raise
                handled(error)
                note("the backward pass could not be batched, rows go one by one: %s", error)
                # other rows would fail in the same way
                self.is_batchable = not self.splits and self._own_nodes(cotangents) is not None
                self.splits = self.is_batchable
        # not where the error is known: its traceback holds what was swept at once
        return self._pulled_one_by_one(cotangents, onto, of)

    def _own_nodes(self, cotangents: Leaves) -> Sequence[Any] | None:
        """Nodes of users' own that may take rows one by one, while others take all at once.

        None where there are none, where they take so much that it makes no difference, or where
        somebody differentiates further.
        """
        keeps_graph = self.keeps_graph and torch.is_grad_enabled()
        if keeps_graph or self.plain is None or is_followed(cotangents):
            return None
        own = own_nodes(nodes_behind([out.grad_fn for out in self.plain.outputs]))
        return own if can_take_rows(own, len(cotangents[0])) else None

    def _pulled_one_by_one(self, cotangents: Leaves, onto: slice, of: LeafNumbers) -> Leaves:
        """K cotangents pulled back, of which it is asked once whether somebody follows them."""
        is_plain = self.transpose is not None and not is_followed(cotangents)
        pull = self.sweep(onto, of) if is_plain else partial(self.pull, onto=onto, of=of)
        return one_by_one(pull, cotangents)


def _in_rows(seeds: Tensor) -> Tensor:
    """Seeds that all samples share, if they are few, in memory of their own for each sample.

    Torch multiplies expanded seeds one after the other, and those in a row as one matrix.
    """
    if seeds.numel() > FEW_NUMBERS or 0 not in seeds.stride():
        return seeds
    return seeds.contiguous()


def spread(cotangents: Leaves, outputs: Leaves, of: LeafNumbers) -> Leaves:
    """Cotangents ``of`` some outputs as cotangents of all outputs: zero for the others."""
    every = [torch.zeros_like(out) for out in outputs]
    numbers = range(len(every))[of] if isinstance(of, slice) else of
    for number, cotangent in zip(numbers, cotangents, strict=True):
        every[number] = cotangent
    return tuple(every)


def batched_like(seeds: Leaves, leaves: Leaves) -> Leaves:
    """The seeds, batched by each vmap outside that batches their leaves.

    Torch may write into seeds, or into zeros like them, and can't write a batched tensor into one
    that is not. It makes every seed as large as the batch, so chunks are tried without it first.
    """
    if not inside_transform():
        return seeds
    return tuple(seed + torch.zeros_like(leaf) for seed, leaf in zip(seeds, leaves, strict=True))
