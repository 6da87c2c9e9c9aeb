"""A strategy's cost, counted while it runs on fake tensors, which have shapes but no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from jacfunc._assembly import columns_to_blocks, numel, rows_to_blocks
from jacfunc._forecasting.compilation import Compilation
from jacfunc._forecasting.costs import Costs
from jacfunc._forecasting.recording import Recorder
from jacfunc._forecasting.replacing import Replacing
from jacfunc._linear_map import EVERY, JacobianOperator, LeafNumbers
from jacfunc._memory import Chunk, PeakBytes
from jacfunc._trees import flatten, map_tensors
from jacfunc._types import Blocks, LeafFunction, Leaves, Tree
from jacfunc.strategies import Sweeping

MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Forecast:
    """A strategy's cost. A number that can't be known is None, and the reason says why.

    Args:
        strategy: the strategy that would run.
        evaluations: calls of the function.
        sweeps: chunks of rows that are pulled back, or of columns that are pushed forward.
        flops: floating point operations, as torch's FlopCounterMode counts them.
        result_bytes: of the Jacobian.
        peak_bytes: of all tensors alive at once, with the result and without the arguments.
        reason: where the numbers come from, or why there are none.
        seconds: on this machine.
        compilation: what :func:`jacfunc.compile` would take, and save, on this machine.
    """

    strategy: Sweeping
    evaluations: int | None
    sweeps: int | None
    flops: int | None
    result_bytes: int | None
    peak_bytes: int | None
    reason: str
    seconds: float | None = None
    compilation: Compilation | None = None

    @property
    def name(self) -> str:
        """The strategy as a string names it."""
        return type(self.strategy).__name__.lower()

    @property
    def chunk_size(self) -> Chunk:
        """Seeds a sweep; None for all at once."""
        return self.strategy.sweeps.chunk_size


class Fakes:
    """Replaces tensors by fakes, and runs functions and strategies on these."""

    def __init__(self, tree: Tree) -> None:
        modes = [leaf.fake_mode for leaf in flatten(tree)[0] if isinstance(leaf, FakeTensor)]
        self.mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)

    def tree(self, tree: Tree) -> Tree:
        """The tree with each tensor replaced by its fake; a tensor has one fake wherever it is."""
        return map_tensors(self._fake, tree)

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)

    def evaluate(self, call: LeafFunction, primals: Leaves) -> tuple[Leaves, Costs | None]:
        """The fake outputs of the function, which have shapes and dtypes; and the costs of it."""
        operator = JacobianOperator(call, primals)
        with self.mode, Recorder(primals) as recorder, Replacing(self.tree):
            outputs = operator.outputs
        return outputs, Costs.of(operator, recorder)

    def forecast(self, strategy: Sweeping, call: LeafFunction, primals: Leaves) -> Forecast:
        """The cost of the strategy, counted while it runs on fakes."""
        with ExitStack() as modes:
            modes.enter_context(self.mode)
            memory = modes.enter_context(PeakBytes())
            flops = modes.enter_context(Replacing(self.tree))  # before memory is counted
            probe = _Probe(call, primals, memory, flops)
            blocks = probe.materialize_by(strategy)
        return probe.forecast(strategy, blocks)


@dataclass(frozen=True)
class _Reading:
    """What the counters say after a sweep; ``live`` and ``peak`` are bytes."""

    seeds: int
    evaluations: int
    flops: int
    live: int
    peak: int


class _CountedFunction:
    """A function that counts its calls; it refers to no operator, so that no cycle keeps fakes."""

    def __init__(self, func: LeafFunction) -> None:
        self._func, self.calls = func, 0

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        self.calls += 1
        return self._func(*primals)


@dataclass
class _Round:
    """Sweeps of the same kind: those through one output leaf, or all pushforwards.

    Args:
        readings: the counters after each sweep that was run.
        done: how many seeds were swept or skipped.
        skipped: how many sweeps were skipped.
    """

    readings: list[_Reading] = field(default_factory=list)
    done: int = 0
    skipped: int = 0


class _Enough(Exception):  # noqa: N818 (no error: all other sweeps cost the same)
    """Ends a strategy once its first sweeps, and the last, have been counted."""


class _Probe(JacobianOperator):
    """An operator that reads counters after each sweep, and skips sweeps whose cost it knows.

    Two full sweeps, and the last, tell what the sweeps between would cost.
    """

    def __init__(
        self, func: LeafFunction, primals: Leaves, memory: PeakBytes, flops: Replacing
    ) -> None:
        self._counted = _CountedFunction(func)
        super().__init__(self._counted, primals)
        self._memory, self._flops = memory, flops
        self._leaves = EVERY
        self._rounds: list[_Round] = []
        self._has_graph = False

    @property
    def outputs(self) -> Leaves:
        """The output leaves of this round: rows of each leaf are swept in a round of their own."""
        return super().outputs[self._leaves]

    def pullback_batch(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> Leaves:
        pull = partial(super().pullback_batch, of=self._leaves)
        return self._count(pull, cotangents, self.outputs)

    def pullback_each(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> Leaves:
        pull = partial(super().pullback_each, of=self._leaves)
        return self._count(pull, cotangents, self.outputs)

    def pushforward_batch(self, tangents: Leaves, randomness: str = "same") -> Leaves:
        push = partial(super().pushforward_batch, randomness=randomness)
        return self._count(push, tangents, self.primals)

    def pushforward_each(self, tangents: Leaves) -> Leaves:
        return self._count(super().pushforward_each, tangents, self.primals)

    def materialize_by(self, strategy: Sweeping) -> Blocks:
        """The strategy's blocks, with those of skipped sweeps, which are made without a sweep."""
        if strategy.sweeps.are_pushes or strategy.sweeps.by_layers:
            return self._round(strategy, EVERY)
        leaves = [slice(number, number + 1) for number in range(len(self.outputs))]
        return tuple(row for leaf in leaves or [EVERY] for row in self._round(strategy, leaf))

    def _round(self, strategy: Sweeping, leaves: slice) -> Blocks:
        self._leaves = leaves
        self._rounds.append(_Round())
        try:
            return strategy.materialize(self)
        except _Enough:
            pass  # products of the sweeps are freed before the result is made
        pushes = strategy.sweeps.are_pushes
        swept, produced = (self.primals, self.outputs)[:: 1 if pushes else -1]
        products = tuple(leaf.new_empty((numel(swept), *leaf.shape)) for leaf in produced)
        assemble = columns_to_blocks if pushes else rows_to_blocks
        return assemble(products, self.outputs, self.primals)

    def forecast(self, strategy: Sweeping, blocks: Blocks) -> Forecast:
        """The counts, extended by those of the skipped sweeps."""
        evaluations, flops, peak = self._counted.calls, self._flops.flops, self._memory.peak
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

    def _count(self, sweep: Callable[[Leaves], Leaves], seeds: Leaves, swept: Leaves) -> Leaves:
        """Products of the seeds; once two sweeps of this size are counted, of the last seeds alone.

        Raises:
            _Enough: if the last seeds have been swept.
        """
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
            _Reading(size, self._counted.calls, self._flops.flops, memory.live, memory.peak)
        )
        self._has_graph = any(product.requires_grad for product in products)
        return products


def _bytes(leaves: Iterable[Tensor]) -> int:
    """Bytes of leaves, also where fakes share memory."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
