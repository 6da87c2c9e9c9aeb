"""Jacobians of every sample of a call: from the whole batch, vmapped, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from jacfunc._assembly import Sink
from jacfunc._errors import Refused, Stale, UnseenWrite, is_out_of_memory
from jacfunc._lending import ModuleState
from jacfunc._linear_map import Dims, JacobianOperator, one_sample, sample_chunks
from jacfunc._log import note
from jacfunc._memory import Chunk, FittedChunks
from jacfunc._planning import (
    UNMAPPED,
    Auto,
    Autotune,
    Plan,
    SampledWays,
    by_memory,
    by_second,
    has_near_second,
    pulls_all_rows,
    recall,
    remember,
)
from jacfunc._samples import (
    FirstSamples,
    OneSample,
    SampleBlocks,
    SampledCall,
    SampleWriter,
    first_again,
)
from jacfunc._settled import SettledBatch, SettledSamples, settled_by
from jacfunc._torch import is_outermost, levels, sweep_batch
from jacfunc._types import Leaves, Tree, product_dtype
from jacfunc.strategies import (
    Evaluation,
    Looped,
    Reverse,
    Strategy,
    Structured,
    in_words_of,
    way_out,
)

Settles: TypeAlias = Callable[[SampledCall, ModuleState, object, Tree], SettledBatch | None]

FINAL = Stale, UnseenWrite, ValueError, TypeError
"""Errors that no other way avoids."""


@dataclass(eq=False)
class SampledJacobian:
    """The Jacobian of every sample of a call.

    Args:
        sink: where the blocks go.
        by_second: is it to be taken by the second choice of its plan? Afterwards: was it?
    """

    batch: SampledCall
    sink: Sink = field(default_factory=Sink)
    by_second: bool = False
    settles: Settles | None = field(default=None, init=False)
    """What the last call has settled, if it was swept at once, by a plan that stays."""
    has_second: bool = field(default=False, init=False)
    """Has the plan a second choice that may be as fast, once calls by both are settled?"""

    def by(self, strategy: Strategy) -> Evaluation:
        """The Jacobian by a strategy; each leaf has the batch in front.

        Samples go one by one where they can't be swept together.
        """
        try:
            return in_words_of(
                self.batch.api,
                lambda: self._by(strategy).evaluation(self.sink),
                instead=way_out(strategy),
            )
        except RuntimeError as error:
            self.batch.check_randomness(error)
            raise

    def _by(self, strategy: Strategy) -> SampleBlocks:
        if not self.batch.size:
            return self._written(None, None)
        is_alone = self.batch.size == 1 and not self._may_use_layers(strategy)
        if is_alone or isinstance(strategy, Looped):
            return self._looped(strategy)
        if isinstance(strategy, Auto | Autotune):
            return self._planned(strategy)
        random_state = self.batch.random_state()
        try:
            return self._refusable(strategy, None)
        except Refused as refusal:
            if not is_outermost():
                raise
            note("samples go one by one: %s", refusal)
        random_state.repeat()
        return self._looped(strategy)

    def _vmapped(self, strategy: Strategy, chunk: Chunk) -> SampleBlocks:
        """Blocks of all samples, under vmap, a chunk of samples at a time."""
        batch, samples = self.batch, self.batch.samples
        one = OneSample(batch.api, batch.call_of)
        random_state = batch.random_state()

        def blocks(leaves: Leaves) -> tuple[Leaves, Leaves]:
            return one.blocks(leaves, strategy), ()

        def take(leaves: Leaves, dims: Dims) -> Leaves:
            if samples.randomness == "same" and not torch.compiler.is_compiling():
                random_state.repeat()  # samples of all chunks draw the same numbers
            return sweep_batch(blocks, leaves, samples.randomness, dims)[0]

        first = FirstSamples(batch.call_of, samples, random_state)
        at_once = self.sink.at_once(chunk)
        if samples.randomness == "different" and _is_share(at_once):
            at_once = None  # or the draws would depend on how many samples come at once
        chunks = sample_chunks(take, samples.leaves, samples.dims, at_once)
        size = samples.size
        chunks = first_again(chunks, size, one.outputs_in, first.outputs)
        leaves = self.sink.samples(chunks, size, one.grid)
        is_at_once = at_once is None and isinstance(strategy, Reverse) and not strategy.chunk_size
        self.settles = SettledSamples.under_vmap if is_at_once else None
        return SampleBlocks(leaves, size, one)

    def _looped(self, strategy: Strategy) -> SampleBlocks:
        """Blocks of one sample after the other, without vmap."""
        batch, samples = self.batch, self.batch.samples
        one = OneSample(batch.api, batch.call_of)
        random_state, size = batch.random_state(), samples.size

        def each() -> Iterator[Leaves]:
            for number in range(size):
                with random_state.of_one(samples.randomness):
                    leaves = one_sample(samples.leaves, samples.dims, number)
                    blocks = one.blocks(leaves, strategy)
                yield tuple(block.unsqueeze(0) for block in blocks)

        first = FirstSamples(batch.call_of, samples, random_state)
        chunks = first_again(each(), size, one.outputs_in, first.output)
        leaves = self.sink.samples(chunks, size, one.grid)
        is_at_once = size == 1 and pulls_all_rows(strategy, one.call.call_kind)
        self.settles = partial(settled_by, by_layers=False) if is_at_once else None
        return SampleBlocks(leaves, size, one)

    def _written(self, chunk: Chunk, rows: Chunk) -> SampleBlocks:
        """Blocks of evaluated batches, a chunk of samples at a time, written where they belong."""
        one = OneSample(self.batch.api, self.batch.call_of)
        writer = SampleWriter(self.batch, self.sink, one)
        leaves = writer.leaves(chunk, rows)
        is_at_once = writer.is_swept_at_once and chunk is None
        self.settles = settled_by if is_at_once else None
        return SampleBlocks(leaves, self.batch.size, one)

    def _planned(self, strategy: Auto | Autotune) -> SampleBlocks:
        """Blocks by the plan for calls of this kind; one by one where no plan runs."""
        batch = self.batch
        random_state = batch.random_state()

        def run(plan: Plan, chunk: Chunk) -> SampleBlocks:
            random_state.repeat()  # what was tried before has drawn
            result = self._refusable(plan.strategy, chunk)
            if plan.timing.left:
                self.settles = None
            self.has_second = has_near_second(plan)
            note("%s samples at once, each: %s: %s", chunk or "all", plan.strategy, plan.reason)
            return result

        # one strategy may plan for several doors, which want different things of one module
        kind = batch.kind.among(batch.samples.randomness, self.sink.copies, levels())
        if self.by_second and (result := by_second(strategy, kind, run)) is not None:
            return result
        self.by_second = False
        recalled = recall(strategy, kind)
        if recalled is not None and recalled[1] == UNMAPPED:
            note("samples go one by one, as none of the plans ran before")
            return self._looped(strategy)
        try:
            return by_memory(strategy, kind, lambda: self._plan(strategy), run)
        except Refused as refusal:
            note("samples go one by one: %s", refusal)
            remember(strategy, kind, (Plan(Looped(), "no other plan ran"), UNMAPPED))
        # not where the refusal is known: its traceback holds what was tried
        random_state.repeat()
        return self._looped(strategy)

    def _plan(self, strategy: Auto | Autotune) -> tuple[Plan, Chunk]:
        call = self.batch.call_of_sample(0)
        operator = JacobianOperator(call, call.primals)
        has_layers = is_outermost() and not self.batch.differentiates_inputs_alone
        copies, draws = self.sink.copies, self.batch.samples.randomness != "error"
        ways = SampledWays(self.batch.size, has_layers, copies, is_outermost() and not draws)
        plan, chunk = in_words_of(
            self.batch.api, lambda: strategy.plan_samples(operator, ways, self._refusable)
        )
        if isinstance(plan.strategy, Structured):
            return plan, chunk
        # remembered with the plan: later calls know how large the pieces are
        return plan, self.sink.at_once(chunk)

    def _refusable(self, strategy: Strategy, chunk: Chunk) -> SampleBlocks:
        # what a rule for layers trips over is no more the function's fault than what vmap does
        is_whole = is_outermost() and self._sweeps_whole_batch(strategy)
        errors = Exception if is_whole else RuntimeError
        try:
            if is_whole:
                assert isinstance(strategy, Structured | Reverse)
                # no product waits to be copied, as it would for the vmapped plan that was refused
                return self._written(None if _is_share(chunk) else chunk, strategy.chunk_size)
            if self.batch.size == 1:
                return self._looped(strategy)
            return self._vmapped(strategy, chunk)
        except errors as error:
            if is_out_of_memory(error) or isinstance(error, FINAL):
                raise
            self.batch.check_randomness(error)  # no plan is better in this
            raise Refused(f"the samples can't be swept together: {error}") from error

    def _may_use_layers(self, strategy: Strategy) -> bool:
        """May one sample alone be differentiated by layers?

        Its products are few, so it pays only where torch multiplies slowly, in low precision.
        """
        if not isinstance(strategy, Auto):
            return isinstance(strategy, Structured)
        is_low = any(product_dtype(x) != x.dtype for x in self.batch.samples.leaves)
        return is_low and is_outermost() and self.batch.differentiates == (True, False)

    def _sweeps_whole_batch(self, strategy: Strategy) -> bool:
        """Does the strategy sweep rows of a batch that is evaluated as a whole?

        All strategies that pull rows back onto inputs do the same.
        """
        if isinstance(strategy, Structured):
            return True
        return isinstance(strategy, Reverse) and self.batch.differentiates_inputs_alone


def _is_share(chunk: Chunk) -> bool:
    """Is it chosen for what waits to be copied, and not for a budget?"""
    return isinstance(chunk, FittedChunks) and chunk.counts_products
