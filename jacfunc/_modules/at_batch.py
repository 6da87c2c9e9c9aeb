"""A module at a batch, evaluated when something is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from jacfunc._arguments import check_chunk_size
from jacfunc._calls import FlatCall
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._lending import CurrentState, Select
from jacfunc._linear_map import Evaluations, LeafNumbers, chosen_leaves, nonzero_numbers
from jacfunc._modules.call import Batching, ModuleCall
from jacfunc._modules.checks import check_module
from jacfunc._modules.independence import Independence
from jacfunc._samples import SampledCall
from jacfunc._torch import RandomState, is_outermost
from jacfunc._trees import Arguments
from jacfunc._types import Leaves, Randomness, Tree
from jacfunc.strategies import in_words_of


@dataclass(frozen=True)
class BatchOptions:
    """A module, and what a user has said about all calls of it.

    Args:
        stays: are all calls made at the parameters of the first, whatever becomes of the module?
        copy: are later answers computed from copies, or else from the tensors themselves?
    """

    api: str
    module: nn.Module
    select: Select
    in_dims: Tree
    randomness: Randomness
    chunk_size: int | None
    independence: Independence = field(default_factory=Independence)
    stays: bool = False
    copy: bool = True

    def __post_init__(self) -> None:
        check_module(self.api, self.module)
        check_chunk_size(self.api, self.chunk_size)
        if self.randomness == "different" and self.chunk_size is not None:
            raise ValueError(
                f"{self.api}: with randomness='different' all samples must be taken at once, to "
                f"draw the same numbers in every answer, got chunk_size={self.chunk_size}. Leave "
                "it out, or use randomness='same'."
            )

    def at(self, arguments: Arguments, is_kept: bool = False) -> ModuleAtBatch:
        """One call of the module; ``is_kept`` if the answers come after the door has returned."""
        return self._at(arguments, None, is_kept)[0]

    def _at(self, arguments: Arguments, targets: Tree, is_kept: bool) -> tuple[ModuleAtBatch, Tree]:
        if not is_outermost():
            raise NotImplementedError(
                f"{self.api}: the graph of an evaluation must be kept, got a call inside a "
                "transform, which keeps none. Use module_jacobian there."
            )
        if is_kept or self.stays:
            state, (arguments, targets) = self._current.kept((arguments, targets), self.copy)
        else:
            state = self._current.now()
        call = ModuleCall(self.api, state, arguments, independence=self.independence)
        batch = call.batch(Batching(self.in_dims, self.randomness))
        random_state = RandomState(batch.samples.leaves)
        return ModuleAtBatch(call, batch, self.chunk_size, random_state), targets

    @cached_property
    def _current(self) -> CurrentState:
        return CurrentState(self.api, self.module, self.select, self.stays)

    def with_targets(
        self, args: tuple[Tree, ...], kwargs: dict[str, Tree], is_kept: bool = False
    ) -> tuple[ModuleAtBatch, Tree]:
        """The call of all positional arguments but the last, and that one: the targets."""
        if not args:
            raise TypeError(
                f"{self.api}: the last positional argument must be the targets of the loss, got "
                "none. Call it as (inputs, targets)."
            )
        return self._at((args[:-1], kwargs), args[-1], is_kept)


@dataclass(frozen=True)
class BatchOutputs:
    """What the module returned for all samples: leaves ``[B, *out]``, and how they are a tree."""

    leaves: Leaves
    extras: Leaves
    call: FlatCall

    def tree(self, leaves: Leaves) -> Tree:
        """The tree of the output, with other leaves in it."""
        return self.call.value(leaves, self.extras)[0]


@dataclass(eq=False)
class ModuleAtBatch:
    """A module at its parameters and a batch.

    Args:
        chunk_size: samples that are evaluated at once; None for all.
        random_state: as it was when the call began: every evaluation draws the same numbers.
    """

    call: ModuleCall
    batch: SampledCall
    chunk_size: int | None
    random_state: RandomState
    last_call: FlatCall = field(init=False)
    """The call of a sample that was evaluated last: it has the trees of the output."""

    @property
    def api(self) -> str:
        return self.call.api

    @property
    def params(self) -> dict[str, Tensor]:
        """The chosen parameters, by name."""
        return self.call.state.point

    @property
    def size(self) -> int:
        """How many samples there are."""
        return self.batch.samples.size

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around evaluations and pullbacks: nothing outside is changed, all draw the same."""
        with self.call.undisturbed():
            self.random_state.repeat()
            yield

    def factors(self) -> Iterator[tuple[slice, FactoredJacobian]]:
        """The Jacobian in each parameter as factors, chunk by chunk of the samples."""
        step = self.chunk_size or self.size
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
        """What cotangents ``[K, B, *out]`` pull back to parameters, by name; none if unused.

        The cotangents are those ``of`` some outputs; by default of all, of which a loss may use
        a few.
        """
        if of is None:
            of = nonzero_numbers(cotangents)
            cotangents = chosen_leaves(cotangents, of)
        with self.undisturbed(), self.factored():
            every = factors.parts_of_cotangents(cotangents, of)
        return {name: parts for name, parts in zip(self.params, every, strict=True) if parts}

    def factored(self) -> AbstractContextManager[None]:
        """Around what is done under vmap: its refusals are in words of the door."""
        way_out = "Use module_jacobian(per_sample=True), which can take the samples one by one"
        return self.batch.under_vmap("per-sample factors need", way_out)

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """The samples from start to stop, evaluated."""
        with self.undisturbed():
            batch = self._independent
            with self.factored():
                factors, self.last_call = batch.factors(start, stop)
            in_words_of(self.api, lambda: self._evaluations.check((start, stop), factors.outputs))
        return factors

    @cached_property
    def _independent(self) -> SampledCall:
        """The batch, once its samples are seen to be independent."""
        self.call.check_independent(self.batch)
        return self.batch

    @cached_property
    def _evaluations(self) -> Evaluations:
        return Evaluations()

    @contextmanager
    def contracting(self) -> Iterator[None]:
        """Around contractions of factors: no graph, and no autocast to a lower precision."""
        devices = {tensor.device.type for tensor in self.params.values()}
        with torch.no_grad(), ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, devices):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    @cached_property
    def outputs(self) -> BatchOutputs:
        """The outputs of all samples, evaluated chunk by chunk."""
        chunks = [self._outputs_of(factors) for _, factors in self.factors()]
        if len(chunks) == 1:
            return chunks[0]
        leaves = zip(*(chunk.leaves for chunk in chunks), strict=True)
        extras = zip(*(chunk.extras for chunk in chunks), strict=True)
        return BatchOutputs(
            tuple(map(torch.cat, leaves)), tuple(map(torch.cat, extras)), chunks[-1].call
        )

    def _outputs_of(self, factors: FactoredJacobian) -> BatchOutputs:
        return BatchOutputs(factors.outputs, factors.extras, self.last_call)
