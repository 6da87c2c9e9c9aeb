"""What a strategy would cost, counted by running it on fake tensors: shapes without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from jacfunc._assembly import columns_to_blocks, numel, rows_to_blocks
from jacfunc._forecasting.costs import Costs
from jacfunc._forecasting.recording import Recorder
from jacfunc._forecasting.replacing import Replacing
from jacfunc._linear_map import EVERY, JacobianOperator, Some
from jacfunc._memory import Chunk, PeakBytes
from jacfunc._trees import flatten, map_tensors
from jacfunc._types import Blocks, LeafFunction, Leaves, Tree
from jacfunc.strategies import Sweeping

MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Forecast:
    """A strategy's cost. What can't be known is None, and the reason says why.

    Args:
        strategy: what would run.
        evaluations: calls of the function.
        sweeps: chunks of rows that are pulled back, or of columns that are pushed forward.
        flops: floating point operations, as torch's FlopCounterMode counts them.
        result_bytes: of the Jacobian.
        peak_bytes: of all tensors alive at once, the result among them, the arguments not.
        reason: where the numbers come from, or why there are none.
        seconds: on this machine.
    """

    strategy: Sweeping
    evaluations: int | None
    sweeps: int | None
    flops: int | None
    result_bytes: int | None
    peak_bytes: int | None
    reason: str
    seconds: float | None = None

    @property
    def name(self) -> str:
        """The strategy as a string names it."""
        return type(self.strategy).__name__.lower()

    @property
    def chunk_size(self) -> Chunk:
        """Seeds a sweep; None for all at once."""
        return self.strategy.sweeps.chunk_size


class Fakes:
    """A world of tensors without numbers: whatever enters is replaced by its like."""

    def __init__(self, tree: Tree) -> None:
        theirs = [leaf.fake_mode for leaf in flatten(tree)[0] if isinstance(leaf, FakeTensor)]
        self.mode = theirs[0] if theirs else FakeTensorMode(allow_non_fake_inputs=True)

    def tree(self, tree: Tree) -> Tree:
        """The tree with each tensor replaced by a fake: the same one whenever it comes again."""
        return map_tensors(self._like, tree)

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)

    def evaluated(self, call: LeafFunction, primals: Leaves) -> tuple[Leaves, Costs | None]:
        """What the function returns, fakes that have shapes and dtypes; and what that costs."""
        operator = JacobianOperator(call, primals)
        with self.mode, Recorder(primals) as recorder, Replacing(self.tree):
            outputs = operator.outputs
        return outputs, Costs.of(operator, recorder)

    def forecast(self, strategy: Sweeping, call: LeafFunction, primals: Leaves) -> Forecast:
        """Carry the strategy out and count."""
        with ExitStack() as modes:
            modes.enter_context(self.mode)
            memory = modes.enter_context(PeakBytes())
            work = modes.enter_context(Replacing(self.tree))  # before memory is counted
            probe = _Probe(call, primals, memory, work)
            blocks = probe.materialized_by(strategy)
        return probe.forecast(strategy, blocks)


@dataclass(frozen=True)
class _Reading:
    """Counters after a sweep."""

    seeds: int
    evaluations: int
    flops: int
    live: int
    peak: int


class _Counted:
    """A function that knows how often it was called, and nobody who calls it: no cycle."""

    def __init__(self, func: LeafFunction) -> None:
        self._func, self.calls = func, 0

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        self.calls += 1
        return self._func(*primals)


@dataclass
class _Round:
    """Sweeps that are alike: those through one output leaf, or all that push."""

    readings: list[_Reading] = field(default_factory=list)
    done: int = 0
    skipped: int = 0


class _Enough(Exception):  # noqa: N818 (no error: the sweeps that are left cost the same)
    """Raised out of a strategy once its first sweeps, and the last, have been counted."""


class _Probe(JacobianOperator):
    """An operator that reads the counters, and ends sweeps that cost what their neighbours do."""

    def __init__(
        self, func: LeafFunction, primals: Leaves, memory: PeakBytes, work: Replacing
    ) -> None:
        self._counted = _Counted(func)
        super().__init__(self._counted, primals)
        self._memory, self._work = memory, work
        self._only = EVERY
        self._rounds: list[_Round] = []
        self._has_graph = False

    @property
    def outputs(self) -> Leaves:
        """Rows are swept leaf by leaf, and here one leaf after the other has a round of its own."""
        return super().outputs[self._only]

    def pullback_batch(self, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        pull = partial(super().pullback_batch, of=self._only)
        return self._sample(pull, cotangents, self.outputs)

    def pullback_each(self, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        pull = partial(super().pullback_each, of=self._only)
        return self._sample(pull, cotangents, self.outputs)

    def pushforward_batch(self, tangents: Leaves, randomness: str = "same") -> Leaves:
        push = partial(super().pushforward_batch, randomness=randomness)
        return self._sample(push, tangents, self.primals)

    def pushforward_each(self, tangents: Leaves) -> Leaves:
        return self._sample(super().pushforward_each, tangents, self.primals)

    def materialized_by(self, strategy: Sweeping) -> Blocks:
        """The strategy's blocks, the sweeps that are left out included."""
        if strategy.sweeps.are_pushes or strategy.sweeps.by_layers:
            return self._round(strategy, EVERY)
        alone = [slice(number, number + 1) for number in range(len(self.outputs))]
        return tuple(row for only in alone or [EVERY] for row in self._round(strategy, only))

    def _round(self, strategy: Sweeping, only: slice) -> Blocks:
        self._only = only
        self._rounds.append(_Round())
        try:
            return strategy.materialize(self)
        except _Enough:
            pass  # what the sweeps left behind is freed before the result is taken
        pushes = strategy.sweeps.are_pushes
        swept, produced = (self.primals, self.outputs)[:: 1 if pushes else -1]
        products = tuple(leaf.new_empty((numel(swept), *leaf.shape)) for leaf in produced)
        assemble = columns_to_blocks if pushes else rows_to_blocks
        return assemble(products, self.outputs, self.primals)

    def forecast(self, strategy: Sweeping, blocks: Blocks) -> Forecast:
        """What was counted, and the same again for the sweeps that were left out."""
        evaluations, flops, peak = self._counted.calls, self._work.flops, self._memory.peak
        result, kept = sum(map(_bytes, blocks)), 0
        run = sum(len(each.readings) for each in self._rounds)
        skipped = sum(each.skipped for each in self._rounds)
        for each in self._rounds:
            if not each.skipped:
                continue
            before, after, last = each.readings[-3:]
            evaluations += each.skipped * (after.evaluations - before.evaluations)
            flops += each.skipped * (after.flops - before.flops)
            if self._has_graph:  # all products and their graphs are kept, to be concatenated
                kept += each.skipped * (after.live - before.live)
                peak = max(peak, last.peak + kept, last.live + kept + result)
        reason = f"{run} of {run + skipped} sweeps counted on fakes"
        return Forecast(strategy, evaluations, run + skipped, flops, result, peak, reason)

    def _sample(self, sweep: Callable[[Leaves], Leaves], seeds: Leaves, swept: Leaves) -> Leaves:
        """The products, unless two sweeps like this have been run: then of the last one alone."""
        this = self._rounds[-1]
        if this.done == numel(swept) and this.readings:
            raise _Enough
        size = seeds[0].shape[0] if seeds else 0
        if size * _bytes(swept) > MAX_BYTES:
            raise NotImplementedError("the seeds of one sweep have no size in 64 bits")
        if size and [reading.seeds for reading in this.readings[-2:]] == [size, size]:
            left = numel(swept) - this.done
            last = left % size or size
            this.skipped = (left - last) // size
            this.done += left - last
            seeds = tuple(seed[:last] for seed in seeds)
            size = last
        products = sweep(seeds)
        this.done += size
        memory = self._memory
        this.readings.append(
            _Reading(size, self._counted.calls, self._work.flops, memory.live, memory.peak)
        )
        self._has_graph = any(product.requires_grad for product in products)
        return products


def _bytes(leaves: Iterable[Tensor]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
