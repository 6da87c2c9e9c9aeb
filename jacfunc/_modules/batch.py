"""Jacobians of every sample of a call: vmapped, one by one, or by layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

from jacfunc._assembly import Sink
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import Refused, Stale, is_out_of_memory, runs_again_below
from jacfunc._factored import FactoredJacobian, LearnedUses, factored
from jacfunc._linear_map import Dims, JacobianOperator, Samples, narrowed, one_sample, sample_chunks
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._memory import Chunk
from jacfunc._modules.one_sample import OneSample, SampleBlocks
from jacfunc._planning import UNMAPPED, Auto, Autotune, Plan, SampledWays, attempt, recall, remember
from jacfunc._remembered import CallKind
from jacfunc._samples import FirstSamples, SampleWriter, check_randomness, first_again, under_vmap
from jacfunc._torch import RandomState, is_outermost, levels, sweep_batch
from jacfunc._types import Leaves
from jacfunc.strategies import Evaluation, Looped, Strategy, Structured, in_words_of


@dataclass(frozen=True)
class SampledCall:
    """The call of a function or a module at many samples.

    Args:
        call_of: makes the call of a single sample from the tensors of that sample.
        samples: the tensors of all samples.
        kind: the identity of the whole call.
        has_layers: is it differentiated by parameters alone, and so possibly by layers?
        sink: where the blocks go.
    """

    api: str
    call_of: Callable[[Leaves], FlatCall]
    samples: Samples
    kind: CallKind
    has_layers: bool = False
    sink: Sink = field(default_factory=Sink)

    def run(self, strategy: Strategy) -> Evaluation:
        """The Jacobian of every sample; each leaf has the batch in front.

        Plans may take the samples one by one where vmap fails, and every strategy does so where
        the module has checkpoints, which no transform knows. Otherwise a refusal says how to ask.
        """
        try:
            return in_words_of(self.api, lambda: self._run(strategy).evaluation(self.sink))
        except RuntimeError as error:
            self.check_randomness(error)
            raise

    def _run(self, strategy: Strategy) -> SampleBlocks:
        if isinstance(strategy, Looped):
            return self._looped(strategy)
        if isinstance(strategy, Auto | Autotune):
            return self._planned(strategy)
        random_state = self._random_state()
        way_out = "Use strategy='looped', which takes the samples one by one"
        try:
            with self.under_vmap("per_sample needs", way_out):
                return self._at_once(strategy, None)
        except Refused as refusal:
            if not runs_again_below(refusal):
                raise
            note("samples go one by one, as no transform knows checkpoints")
        random_state.repeat()
        return self._looped(strategy)

    def under_vmap(self, needs: str, way_out: str) -> AbstractContextManager[None]:
        """A context that refuses what fails under vmap alone; ``needs`` begins the message."""
        return under_vmap(self.api, self.samples.randomness, self.first_call, needs, way_out)

    def _vmapped(self, strategy: Strategy, chunk: Chunk) -> SampleBlocks:
        """Blocks of all samples, under vmap, a chunk of samples at a time."""
        samples, one = self.samples, OneSample(self.api, self.call_of)

        def blocks(leaves: Leaves) -> tuple[Leaves, Leaves]:
            return one.blocks(leaves, strategy), ()

        def take(leaves: Leaves, dims: Dims) -> Leaves:
            return sweep_batch(blocks, leaves, samples.randomness, dims)[0]

        first = FirstSamples(self.call_of, samples, self._random_state())
        chunks = sample_chunks(take, samples.leaves, samples.dims, self.sink.at_once(chunk))
        chunks, size = first_again(chunks, one.outputs_in, first.outputs), samples.size
        return SampleBlocks(self.sink.samples(chunks, size, one.grid), size, one)

    def _looped(self, strategy: Strategy) -> SampleBlocks:
        """Blocks of one sample after the other, without vmap."""
        samples, one = self.samples, OneSample(self.api, self.call_of)
        random_state, size = self._random_state(), samples.size

        def each() -> Iterator[Leaves]:
            for number in range(size):
                with random_state.of_one(samples.randomness):
                    leaves = one_sample(samples.leaves, samples.dims, number)
                    blocks = one.blocks(leaves, strategy)
                yield tuple(block.unsqueeze(0) for block in blocks)

        first = FirstSamples(self.call_of, samples, random_state)
        chunks = first_again(each(), one.outputs_in, first.output)
        return SampleBlocks(self.sink.samples(chunks, size, one.grid), size, one)

    def _structured(self, strategy: Structured, chunk: Chunk) -> SampleBlocks:
        """Blocks layer by layer, a chunk of samples at a time, each written where it belongs."""
        one, size = OneSample(self.api, self.call_of), self.samples.size
        writer = SampleWriter(partial(self._factors, one), self.sink, one.grid)
        return SampleBlocks(writer.leaves(size, chunk, strategy.chunk_size), size, one)

    def _planned(self, strategy: Auto | Autotune) -> SampleBlocks:
        """Blocks by the plan for calls of this kind; one by one where no plan runs under vmap."""
        random_state = self._random_state()

        def run(plan: Plan) -> SampleBlocks:
            random_state.repeat()  # what was tried before has drawn
            return self._refusable(plan.strategy, chunk)

        # one strategy may plan for several doors, which want different things of one module
        randomness, copies = self.samples.randomness, self.sink.copies
        kind = self.kind.among(randomness, copies, self.has_layers, levels())
        memory = recall(strategy, kind)
        plan, chunk = memory or self._plan(strategy)
        if chunk == UNMAPPED:
            note("samples go one by one, as none of the plans ran under vmap before")
            return self._looped(strategy)
        try:
            plan, result = attempt(plan, run)
        except Refused as refusal:
            note("samples go one by one: %s", refusal)
            remember(strategy, kind, (plan, UNMAPPED))
            random_state.repeat()
            return self._looped(strategy)
        if memory is None or plan is not memory[0]:
            remember(strategy, kind, (plan, chunk))
        note("%s samples at once, each: %s: %s", chunk or "all", plan.strategy, plan.reason)
        return result

    def factors(self, start: int, stop: int) -> tuple[FactoredJacobian, FlatCall]:
        """An evaluation of the samples from start to stop, and the call of one, for its trees."""
        one = OneSample(self.api, self.call_of)
        return self._factors(one, start, stop), one.call

    def _factors(self, one: OneSample, start: int, stop: int) -> FactoredJacobian:
        if not self.has_layers:
            raise NotImplementedError(
                f"{self.api}: per_sample, strategy 'structured' must be for parameters alone, got "
                "inputs, of which every sample has its own. Use strategy='auto'."
            )
        uses, every = LearnedUses.of(self.kind), self.samples
        samples = replace(every, leaves=narrowed(every.leaves, every.dims, start, stop))
        with alone():
            call, repeat = self.first_call(), self._random_state().repeat
            return factored(one.of_params, call, call.primals, samples, uses, repeat)

    def operator(self) -> tuple[JacobianOperator, OneSample]:
        """All samples as one function on one graph, and the sample whose call it makes.

        Its primals ``[B, *in]`` are each sample's own. Its Jacobian holds a block a sample, so that
        one cotangent serves all of them.
        """
        one, first = OneSample(self.api, self.call_of), self.first_call()
        of_all, params = self.samples.with_own_params(one.of_params, first.primals)
        return JacobianOperator(OfCalls(of_all, first.state), params), one

    def first_call(self) -> FlatCall:
        """The call of the first sample."""
        return self.call_of(one_sample(self.samples.leaves, self.samples.dims, 0))

    def check_randomness(self, error: Exception) -> None:
        """Say in words of the door that a module drew random numbers, if that was the error."""
        check_randomness(self.api, self.samples.randomness, error)

    def _plan(self, strategy: Auto | Autotune) -> tuple[Plan, Chunk]:
        call = self.first_call()
        operator = JacobianOperator(call, call.primals)
        has_layers = self.has_layers and is_outermost()
        ways = SampledWays(self.samples.size, has_layers, self.sink.copies)
        plan, chunk = in_words_of(
            self.api, lambda: strategy.plan_samples(operator, ways, self._refusable)
        )
        if isinstance(plan.strategy, Structured):
            return plan, chunk
        # remembered with the plan: later calls know how large the pieces are
        return plan, self.sink.at_once(chunk)

    def _refusable(self, strategy: Strategy, chunk: Chunk) -> SampleBlocks:
        # what a rule for layers trips over is no more the function's fault than what vmap does
        errors = Exception if isinstance(strategy, Structured) else RuntimeError
        try:
            return self._at_once(strategy, chunk)
        except errors as error:
            if is_out_of_memory(error) or isinstance(error, Stale):
                raise
            self.check_randomness(error)  # no plan is better in this
            raise Refused(f"the samples do not run under vmap: {error}") from error

    def _at_once(self, strategy: Strategy, chunk: Chunk) -> SampleBlocks:
        if isinstance(strategy, Structured) and is_outermost():
            return self._structured(strategy, chunk)
        return self._vmapped(strategy, chunk)

    def _random_state(self) -> RandomState:
        return RandomState(self.samples.leaves)
