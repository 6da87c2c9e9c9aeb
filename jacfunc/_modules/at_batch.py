"""A module at a batch, evaluated when something is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import Sink
from jacfunc._calls import FlatCall
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._lending import ModuleState, Select, detached_copy
from jacfunc._linear_map import Evaluations, LeafNumbers, batch_size, chosen_leaves, nonzero_numbers
from jacfunc._lock import alone
from jacfunc._modules.batch import SampledCall
from jacfunc._modules.call import POSITIONS, ModuleCall
from jacfunc._modules.checks import check_module
from jacfunc._modules.independence import Independence
from jacfunc._modules.inputs import InputChoice
from jacfunc._torch import RandomState, is_outermost
from jacfunc._trees import Arguments
from jacfunc._types import Leaves, Randomness, Tree
from jacfunc.strategies import Structured, in_words_of


@dataclass(frozen=True)
class BatchOptions:
    """What a user said about all calls of a module."""

    api: str
    module: nn.Module
    select: Select
    in_dims: Tree
    randomness: Randomness
    chunk_size: int | None
    independence: Independence = field(default_factory=Independence)
    is_held: bool = False
    """Are all calls made at the point of the first?"""
    strategy: Structured = field(default_factory=Structured)
    """Remembers, from call to call, which parameters no rule covers."""
    states: list[ModuleState] = field(default_factory=list)
    """As the last call found the module."""

    def __post_init__(self) -> None:
        check_module(self.api, self.module)
        check_chunk_size(self.api, self.chunk_size)
        if self.randomness == "different" and self.chunk_size is not None:
            raise ValueError(
                f"{self.api}: with randomness='different' all samples must be taken at once, to "
                f"draw the same numbers in every answer, got chunk_size={self.chunk_size}. Leave "
                "it out, or use randomness='same'."
            )

    def at(self, arguments: Arguments, is_held: bool = False) -> ModuleAtBatch:
        """One call of the module; to be held, if it is evaluated after the door has answered."""
        if not is_outermost():
            raise NotImplementedError(
                f"{self.api}: the graph of an evaluation must be kept, got a call inside a "
                "transform, which keeps none. Use module_jacobian there."
            )
        with alone():
            state = self._state()
        self.states[:] = [state]
        if is_held or self.is_held:
            state, arguments = state.copied(), detached_copy(arguments)
        if self.is_held:
            self.states[:] = [state]
        call = ModuleCall(
            self.api,
            state,
            POSITIONS["params"],
            InputChoice(),
            arguments,
            with_buffers=False,
            create_graph=False,
            independence=self.independence,
        )
        batch = call.batch(Sink(), self.in_dims, self.randomness)
        return ModuleAtBatch(self, call, batch, RandomState(batch.leaves))

    def _state(self) -> ModuleState:
        before = next(iter(self.states), None)
        if before is not None and before.is_copy:
            return before
        return ModuleState.after(before, self.api, self.module, self.select)

    def with_targets(
        self, args: tuple[Tree, ...], kwargs: dict[str, Tree], is_held: bool = False
    ) -> tuple[ModuleAtBatch, Tree]:
        """The call of all but the last of the positional arguments, and that."""
        if not args:
            raise TypeError(
                f"{self.api}: the last positional argument must be the targets of the loss, got "
                "none. Call it as (inputs, targets)."
            )
        point = self.at((args[:-1], kwargs), is_held)
        return point, detached_copy(args[-1]) if is_held else args[-1]


@dataclass(frozen=True)
class BatchOutputs:
    """What the module returned for all samples: leaves ``[B, *out]``, and how they are a tree."""

    leaves: Leaves
    extras: Leaves
    call: FlatCall

    def tree(self, leaves: Leaves) -> Tree:
        """Other values in the place of the leaves."""
        return self.call.value(leaves, self.extras)[0]


@dataclass(frozen=True)
class ModuleAtBatch:
    """A module at its parameters and a batch."""

    door: BatchOptions
    call: ModuleCall
    batch: SampledCall
    draws: RandomState

    @property
    def api(self) -> str:
        return self.door.api

    @property
    def params(self) -> dict[str, Tensor]:
        """The chosen ones, by name."""
        return self.call.state.point

    @property
    def size(self) -> int:
        """How many samples there are."""
        return batch_size(self.batch.leaves, self.batch.dims)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Nothing outside is changed, and every evaluation draws the same random numbers."""
        with self.call.undisturbed():
            self.draws.repeat()
            yield

    def factors(self) -> Iterator[tuple[slice, FactoredJacobian]]:
        """Chunk by chunk of the samples, each parameter's Jacobian as factors."""
        step = self.door.chunk_size or self.size
        if step >= self.size:
            yield slice(None), self._all_factors
            return
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            yield slice(start, stop), self.between(start, stop)

    @cached_property
    def _all_factors(self) -> FactoredJacobian:
        return self.between(0, self.size)

    def parts_of(
        self, factors: FactoredJacobian, cotangents: Leaves, of: LeafNumbers | None = None
    ) -> dict[str, list[Part]]:
        """What cotangents ``[K, B, *out]`` pull back, by name; not of unused parameters.

        They are those of some outputs, or of all, of which a loss may not use every one.
        """
        if of is None:
            of = nonzero_numbers(cotangents)
            cotangents = chosen_leaves(cotangents, of)
        with self.undisturbed(), self.factored():
            parts = factors.of_cotangents(cotangents, of)
        return {name: some for name, some in zip(self.params, parts, strict=True) if some}

    def factored(self) -> AbstractContextManager[None]:
        """Around what is done under vmap: refusals in words of the door."""
        way_out = "Use module_jacobian(per_sample=True), which can take the samples one by one"
        return self.batch.under_vmap("per-sample factors need", way_out)

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """Some of the samples, evaluated."""
        with self.undisturbed():
            batch = self._independent
            with self.factored():
                found = batch.factors(self.door.strategy, start, stop)
            in_words_of(self.api, lambda: self._evaluated.check((start, stop), found.outputs))
        return found

    @cached_property
    def _independent(self) -> SampledCall:
        """The batch, looked at once, whatever is asked."""
        self.call.check_independent(self.batch)
        return self.batch

    @cached_property
    def _evaluated(self) -> Evaluations:
        return Evaluations()

    @contextmanager
    def contracting(self) -> Iterator[None]:
        """Nothing is recorded, and nothing is rounded to less than what it came in."""
        devices = {tensor.device.type for tensor in self.params.values()}
        with torch.no_grad(), ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, devices):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def outputs_of(self, factors: FactoredJacobian) -> BatchOutputs:
        """Of the samples that were just evaluated."""
        return BatchOutputs(factors.outputs, factors.linearization.extras, self.last_call)

    @property
    def last_call(self) -> FlatCall:
        """Of a sample that was evaluated."""
        return self.batch.seen[-1][0]

    @cached_property
    def outputs(self) -> BatchOutputs:
        """Of all samples, evaluated chunk by chunk."""
        chunks = [self.outputs_of(factors) for _, factors in self.factors()]
        if len(chunks) == 1:
            return chunks[0]
        leaves = zip(*(chunk.leaves for chunk in chunks), strict=True)
        extras = zip(*(chunk.extras for chunk in chunks), strict=True)
        return BatchOutputs(
            tuple(map(torch.cat, leaves)), tuple(map(torch.cat, extras)), chunks[-1].call
        )
