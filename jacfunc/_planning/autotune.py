"""``strategy="autotune"``: the fastest strategy, measured once and remembered."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jacfunc._arguments import check_memory
from jacfunc._assembly import Sink
from jacfunc._calls import fingerprint
from jacfunc._errors import Refused
from jacfunc._forecasting import counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import note
from jacfunc._measuring import Spread, seconds_of, shuffled
from jacfunc._memory import Chunk
from jacfunc._planning.auto import by_plan
from jacfunc._planning.budget import bounded, bounded_samples, fewer_rows
from jacfunc._planning.choice import SampledWays, by_sizes, candidates, fastest
from jacfunc._planning.plan import Plan, alternatives, rows_first
from jacfunc._planning.recall import settled_by_plan
from jacfunc._planning.tuning_cache import winners
from jacfunc._remembered import CallKind
from jacfunc._types import Blocks
from jacfunc._units import in_seconds
from jacfunc.strategies import Forward, Reverse, Strategy, Streaming, Structured, Sweeping

ROUNDS, FEWEST = 25, 5
SECONDS = 1.0
"""Seconds after which a tuning makes no further round, once it has made the fewest."""

HOPELESS, SETTLED = 1.5, 3
"""A candidate that is slower than the best by this factor is measured no more, once so many rounds
were made: at first it may find no memory that is in use already, or learn what later calls know."""

SETTING_UP, SLOW_START = 0.5, 8
"""A candidate is out when its first call took more seconds than the first, and more than the second
times those of the fastest. In a first call torch sets things up, and the system looks for memory.
"""

MEASURED = "it was the fastest when measured"
BOTH = (Reverse(), Forward())
BY_LAYERS = Structured()
FEW_SEEDS = 16
"""Up to so many seeds a loop without vmap is measured, too."""

REACH = 8
"""Forward mode is measured where there are at most this many times more inputs than outputs."""


@dataclass(frozen=True)
class Autotune(Streaming):
    """Measures the candidates on first use, in interleaved rounds, and takes the fastest.

    The winner is remembered for the function's code, the shapes, dtypes and devices of all
    arguments, and the transforms outside: in the process, and in a file where one is named.

    Args:
        cache: a JSON file that keeps winners by machine and versions; None keeps none.
        memory: bytes that a call may take, its result among them, as a number or in words.

    Raises:
        TypeError, ValueError: a budget that is none, a cache file that Autotune did not write.

    Cost:
        On first use five to 25 calls of each candidate, and four of one that is much slower.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.jacobian(torch.sin, strategy=jacfunc.Autotune())
        >>> jac(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    cache: str | Path | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        check_memory("Autotune", self.memory)
        if self.cache is not None and not isinstance(self.cache, str | Path):
            raise TypeError(
                f"Autotune: cache must be the path of a file or None, got {self.cache!r}. "
                "Write 'winners.json', or a pathlib.Path."
            )

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the fastest strategy."""
        return by_plan(self, sink, operator, BOTH)

    def settled_for(self, kind: CallKind) -> Strategy | None:
        """The winner, once it is known."""
        return settled_by_plan(self, kind)

    def plan(self, operator: JacobianOperator) -> Plan:
        """The plan with the winner, which is measured unless it is known."""
        key = _key(operator)
        winner, device = self._winner(operator, key), _device(operator)
        operator.rewind_generators()
        costs = counted_costs(operator.unevaluated())
        if costs is None:
            return by_sizes(operator, BOTH)
        if winner is None:
            run = partial(_materialized, operator)
            winner = self._measure(device, key, candidates(costs, BOTH, REACH, FEW_SEEDS), run)
        operator.rewind_generators()  # as if nothing had been evaluated
        plan = Plan(winner, MEASURED, None, alternatives(winner, BOTH, costs.rows, costs.columns))
        return bounded(plan, costs, check_memory("Autotune", self.memory))

    def plan_samples(
        self,
        operator: JacobianOperator,
        samples: SampledWays,
        run: Callable[[Sweeping, Chunk], Any],
    ) -> tuple[Plan, Chunk]:
        """The plan for each sample of a batch, and how many samples to take at once.

        ``operator`` is the one of a single sample; ``run`` takes all samples by a strategy.
        """
        costs = counted_costs(operator)
        operator.rewind_generators()  # the samples draw as if none had been evaluated before
        if costs is None:
            return rows_first(by_sizes(operator, BOTH), operator), None
        memory, size = check_memory("Autotune", self.memory), samples.size
        batch_costs, ways = costs.times(size, samples.are_copied), samples.ways(BOTH, BY_LAYERS)
        forecast = rows_first(fastest(batch_costs, ways), operator)
        plan, chunk = bounded_samples(forecast, costs, size, memory)
        if chunk is not None:  # memory decides, not time
            return plan, chunk
        key = f"{_key(operator)} × {size}{' copied' * samples.are_copied}"
        winner, device = self._winner(operator, key), _device(operator)
        if winner is None:
            possible = dict.fromkeys(
                (*candidates(batch_costs, ways, REACH, FEW_SEEDS), fewer_rows(batch_costs))
            )
            try:
                winner = self._measure(device, key, possible, lambda strategy: run(strategy, None))
            except Refused:  # every candidate was: who runs the plan falls back to a loop
                return plan, chunk
        operator.rewind_generators()
        plan = Plan(winner, MEASURED, None, alternatives(winner, ways, costs.rows, costs.columns))
        return rows_first(plan, operator), None

    def _winner(self, operator: JacobianOperator, key: str) -> Sweeping | None:
        return winners(self._file()).get(_device(operator), key)

    def _measure(
        self,
        device: torch.device,
        key: str,
        strategies: Iterable[Sweeping],
        run: Callable[[Sweeping], Any],
    ) -> Sweeping:
        times = medians(list(strategies), run, device)
        best = min(times, key=times.__getitem__)
        winners(self._file()).put(device, key, best, times[best])
        note("measured: %s", ", ".join(f"{s} {in_seconds(t)}" for s, t in times.items()))
        return best

    def _file(self) -> Path | None:
        return None if self.cache is None else Path(self.cache).expanduser().resolve()


def _key(operator: JacobianOperator) -> str:
    called, kind, _ = operator.call_kind
    # jacfunc's own function around a module may have other code in the next version
    about = fingerprint(called if isinstance(called, nn.Module) else operator.func), kind
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _device(operator: JacobianOperator) -> torch.device:
    return operator.primals[0].device if operator.primals else torch.device("cpu")


def _materialized(operator: JacobianOperator, strategy: Sweeping) -> Blocks:
    operator = operator.unevaluated()
    operator.rewind_generators()
    return strategy.materialize(operator)


def medians(
    strategies: Sequence[Sweeping],
    run: Callable[[Sweeping], Any],
    device: torch.device,
    clock: Callable[[Callable[[], Any], torch.device], float] = seconds_of,
) -> dict[Sweeping, float]:
    """Median seconds of the strategies that are left in the last round."""
    first: dict[Sweeping, float] = {}
    for strategy in strategies:  # untimed later: torch sets things up on first use
        try:
            first[strategy] = clock(partial(run, strategy), device)
        except Refused as refusal:
            note("%s was refused: %s", strategy, refusal)
            if strategy == strategies[-1] and not first:
                raise
    least = min(first.values())
    times: dict[Sweeping, list[float]] = {
        s: [] for s, took in first.items() if took <= max(SLOW_START * least, SETTING_UP)
    }
    start = time.perf_counter()
    for number, turns in enumerate(shuffled(times, ROUNDS), 1):
        for strategy in turns:
            times[strategy].append(clock(partial(run, strategy), device))
        least = min(map(min, times.values()))
        for strategy in turns:
            if number >= SETTLED and min(times[strategy]) > HOPELESS * least:
                del times[strategy]
        if number >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    return {strategy: Spread.of(seconds).median for strategy, seconds in times.items()}
