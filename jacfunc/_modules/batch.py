"""Jacobians of every sample of a batch: vmapped, or one by one where nothing is vmapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from jacfunc._assembly import Grid, Sink
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import Refused, Stale, is_out_of_memory, runs_again_below
from jacfunc._factored import FactoredJacobian, LearnedUses, factored
from jacfunc._faults import untracked
from jacfunc._linear_map import (
    Dims,
    JacobianOperator,
    Samples,
    batch_size,
    narrowed,
    one_sample,
    sample_chunks,
)
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._memory import Chunk
from jacfunc._planning import (
    UNMAPPED,
    Auto,
    Autotune,
    Plan,
    SampledWays,
    attempt,
    recall,
    remember,
)
from jacfunc._remembered import CallKind
from jacfunc._samples import FirstSamples, SampleWriter, check_randomness, first_again, under_vmap
from jacfunc._torch import RandomState, is_outermost, levels, sweep_batch
from jacfunc._types import Leaves, Randomness
from jacfunc.strategies import Evaluation, Looped, Strategy, Structured, evaluate, in_words_of


@dataclass(frozen=True)
class SampledCall:
    """Samples of one call: tensors, and the dimension in which each holds them, if it does.

    ``call_of(leaves)`` is the call of a single sample, ``kind`` the identity of the whole call.
    """

    api: str
    call_of: Callable[[Leaves], FlatCall]
    leaves: Leaves
    dims: Dims
    kind: CallKind
    randomness: Randomness
    sink: Sink
    has_layers: bool = False
    """Are parameters alone what it is differentiated by?"""
    seen: list[tuple[FlatCall, Grid]] = field(default_factory=list)
    """The last sample: its trees, and the sizes of its leaves."""

    def run(self, strategy: Strategy) -> Evaluation:
        """Of all samples: every leaf has the batch in front.

        Only what plans may take the samples one by one unasked, and whoever meets checkpoints,
        which no transform knows; others say how to ask.
        """
        try:
            return in_words_of(self.api, lambda: self._sorted(self._run(strategy)))
        except RuntimeError as error:
            self.check_randomness(error)
            raise

    def _run(self, strategy: Strategy) -> Leaves:
        if isinstance(strategy, Looped):
            return self.looped(strategy)
        if isinstance(strategy, Auto | Autotune):
            return self.planned(strategy)
        draws = RandomState(self.leaves)
        way_out = "Use strategy='looped', which takes the samples one by one"
        try:
            with self.under_vmap("per_sample needs", way_out):
                return self._at_once(strategy, None)
        except Refused as refusal:
            if not runs_again_below(refusal):
                raise
            note("samples go one by one, as no transform knows checkpoints")
        draws.repeat()
        return self.looped(strategy)

    def under_vmap(self, needs: str, way_out: str) -> AbstractContextManager[None]:
        """What fails under vmap alone is refused, in words that begin with what ``needs`` it."""
        return under_vmap(self.api, self.randomness, self._first, needs, way_out)

    def vmapped(self, strategy: Strategy, chunk: Chunk = None) -> Leaves:
        """All samples at once, or a chunk of them at a time."""

        def of_one(leaves: Leaves) -> tuple[Leaves, Leaves]:
            return self._of_one(leaves, strategy), ()

        def take(leaves: Leaves, dims: Dims) -> Leaves:
            return sweep_batch(of_one, leaves, self.randomness, dims)[0]

        first = self._first_samples(RandomState(self.leaves))
        chunks = sample_chunks(take, self.leaves, self.dims, self.sink.at_once(chunk))
        chunks = first_again(chunks, self._outputs_in, first.outputs)
        return self.sink.samples(chunks, self._size(), self._grid)

    def looped(self, strategy: Strategy) -> Leaves:
        """One sample after the other, without vmap."""
        draws = RandomState(self.leaves)

        def each() -> Iterator[Leaves]:
            for number in range(self._size()):
                with draws.of_one(self.randomness):
                    products = self._of_one(one_sample(self.leaves, self.dims, number), strategy)
                yield tuple(product.unsqueeze(0) for product in products)

        chunks = first_again(each(), self._outputs_in, self._first_samples(draws).output)
        return self.sink.samples(chunks, self._size(), self._grid)

    def planned(self, strategy: Auto | Autotune) -> Leaves:
        """As the strategy plans for calls of this kind; looped where torch vmaps no plan."""
        draws = RandomState(self.leaves)

        def run(plan: Plan) -> Leaves:
            draws.repeat()  # what was tried before has drawn
            return self._refusable(plan.strategy, chunk)

        # one strategy may plan for several doors, which want different things of one module
        kind = self.kind.among(self.randomness, self.sink.copies, self.has_layers, levels())
        known = recall(strategy, kind)
        plan, chunk = known or self._plan(strategy)
        if chunk == UNMAPPED:
            note("samples go one by one, as none of the plans ran under vmap before")
            return self.looped(strategy)
        try:
            plan, result = attempt(plan, run)
        except Refused as refusal:
            note("samples go one by one: %s", refusal)
            remember(strategy, kind, (plan, UNMAPPED))
            draws.repeat()
            return self.looped(strategy)
        if known is None or plan is not known[0]:
            remember(strategy, kind, (plan, chunk))
        note("%s samples at once, each: %s: %s", chunk or "all", plan.strategy, plan.reason)
        return result

    def structured(self, strategy: Structured, chunk: Chunk = None) -> Leaves:
        """Layer by layer, a chunk of samples at a time, each written where it belongs."""
        layers = SampleWriter(partial(self.factors, strategy), self.sink, self._grid)
        return layers.leaves(self._size(), chunk, strategy.chunk_size)

    def factors(self, strategy: Structured, start: int, stop: int) -> FactoredJacobian:
        """Some samples evaluated, each parameter's Jacobian kept as factors."""
        if not self.has_layers:
            raise NotImplementedError(
                f"{self.api}: per_sample, strategy 'structured' must be for parameters alone, got "
                "inputs, of which every sample has its own. Use strategy='auto'."
            )
        met = LearnedUses.of(self.kind)
        leaves = narrowed(self.leaves, self.dims, start, stop)
        samples = Samples(leaves, self.dims, self.randomness)
        with alone():
            call, repeat = self._first(), RandomState(self.leaves).repeat
            return factored(self._of_params, call, call.primals, samples, met, repeat)

    def operator(self) -> JacobianOperator:
        """All samples as one function on one graph: of primals ``[B, *in]``, each sample's own.

        Its Jacobian holds a block a sample, so that one cotangent serves all of them.
        """
        samples = Samples(self.leaves, self.dims, self.randomness)
        first = self._first()
        of_all, params = samples.apart(self._of_params, first.primals)
        return JacobianOperator(OfCalls(of_all, first.state), params)

    def check_randomness(self, error: Exception) -> None:
        """Was it that a random module was not to draw?"""
        check_randomness(self.api, self.randomness, error)

    def _plan(self, strategy: Auto | Autotune) -> tuple[Plan, Chunk]:
        call = self._first()
        operator = JacobianOperator(call, call.primals)
        samples = SampledWays(self._size(), self.has_layers and is_outermost(), self.sink.copies)
        plan, chunk = in_words_of(
            self.api, lambda: strategy.plan_samples(operator, samples, self._refusable)
        )
        if isinstance(plan.strategy, Structured):
            return plan, chunk
        # remembered with the plan: later calls know how large the pieces are
        return plan, self.sink.at_once(chunk)

    def _refusable(self, strategy: Strategy, chunk: Chunk) -> Leaves:
        # what a rule for layers trips over is no more the function's fault than what vmap does
        theirs = Exception if isinstance(strategy, Structured) else RuntimeError
        try:
            return self._at_once(strategy, chunk)
        except theirs as error:
            if is_out_of_memory(error) or isinstance(error, Stale):
                raise
            self.check_randomness(error)  # no plan is better in this
            raise Refused(f"the samples do not run under vmap: {error}") from error

    def _at_once(self, strategy: Strategy, chunk: Chunk) -> Leaves:
        if isinstance(strategy, Structured) and is_outermost():
            return self.structured(strategy, chunk)
        return self.vmapped(strategy, chunk)

    def _of_one(self, leaves: Leaves, strategy: Strategy) -> Leaves:
        """Blocks, outputs and extras of one sample, one after the other."""
        self.seen.clear()  # a call remembers its outputs, and these their graph
        call = self.call_of(leaves)
        found = evaluate(self.api, call, strategy)
        outputs, extras = found.image()
        self.seen[:] = [(call, Grid.of(outputs, call.primals))]
        return (*(block for row in found.blocks for block in row), *outputs, *extras)

    def _of_params(self, params: Leaves, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Outputs and extras of one sample."""
        with untracked():
            call = self.call_of(leaves)
        outputs, extras = call(*params)
        with untracked():
            self.seen[:] = [(call, Grid.of(outputs, call.primals))]
        return outputs, extras

    def _sorted(self, leaves: Leaves) -> Evaluation:
        """What :meth:`_of_one` lined up, of all samples."""
        (call, grid), size = self.seen[-1], self._size()
        num_outputs, width = len(grid.rows), len(grid.columns)
        blocks = tuple(leaves[i * width : (i + 1) * width] for i in range(num_outputs))
        beside = leaves[num_outputs * width :]
        blocks = self.sink.finished(blocks, grid, (size,))
        image = (beside[:num_outputs], beside[num_outputs:])
        return Evaluation(call, blocks, lambda: image, self.sink)

    def _outputs_in(self, leaves: Leaves) -> Leaves:
        """Of what :meth:`_of_one` lined up."""
        start = len(self._grid().rows) * len(self._grid().columns)
        return leaves[start : start + len(self._grid().rows)]

    def _grid(self) -> Grid:
        return self.seen[-1][1]

    def _first_samples(self, draws: RandomState) -> FirstSamples:
        return FirstSamples(self.call_of, self.leaves, self.dims, self.randomness, draws)

    def _first(self) -> FlatCall:
        return self.call_of(one_sample(self.leaves, self.dims, 0))

    def _size(self) -> int:
        return batch_size(self.leaves, self.dims)
