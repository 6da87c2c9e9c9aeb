"""``strategy="autotune"``: measures the candidates once, and remembers the winner."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jacfunc._arguments import check_memory
from jacfunc._calls import fingerprint
from jacfunc._errors import Refused
from jacfunc._forecasting import Swept, counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import note
from jacfunc._measuring import seconds_of, shuffled
from jacfunc._memory import Chunk
from jacfunc._planning.auto import by_plan
from jacfunc._planning.budget import bounded, bounded_samples, fewer_rows
from jacfunc._planning.choice import SampledWays, by_sizes, candidates, fastest
from jacfunc._planning.plan import Plan, others, rows_first
from jacfunc._planning.tuning_cache import winners
from jacfunc._types import Blocks
from jacfunc._units import in_seconds
from jacfunc.strategies import Forward, Reverse, Structured

ROUNDS, FEWEST = 25, 5
SECONDS = 1.0
"""That long a tuning goes on with further rounds."""

HOPELESS = 1.5
"""A candidate slower than the best by this factor is out."""

SETTING_UP, SLOW_START = 0.5, 8
"""Seconds that a first call may take before it tells of later ones, and how many times that of the
fastest: torch sets something up, or the system looks for memory that nobody had before.
"""

MEASURED = "it was the fastest when measured"
BOTH = (Reverse(), Forward())
BY_LAYERS = Structured()
FEW_SEEDS = 16
"""Seeds up to which a loop without vmap is worth a try."""

REACH = 8
"""Forward mode is measured where inputs are up to so many times the outputs."""


@dataclass(frozen=True)
class Autotune:
    """Measures the candidates on first use, in interleaved rounds, and takes the fastest.

    The winner is remembered for the function's code, the shapes, dtypes and devices of all
    arguments, and the transforms outside: in the process, and in a file where one is named.

    Args:
        cache: a JSON file that keeps winners by machine and versions; None keeps none.
        memory: bytes that a call may take, its result among them, as a number or in words.

    Raises:
        TypeError, ValueError: a budget that is none, a cache file that Autotune did not write.

    Cost:
        On first use five to 25 calls of each candidate that is not hopeless.

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

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the fastest strategy."""
        return by_plan(self, operator, BOTH)

    def plan(self, operator: JacobianOperator) -> Plan:
        """The winner, measured where it is not known."""
        key = _key(operator)
        won, device = self._won(operator, key), _device(operator)
        operator.repeat_draws()
        costs = counted_costs(operator.again())
        if costs is None:
            return by_sizes(operator, BOTH)
        if won is None:
            run = partial(_materialized, operator)
            won = self._measure(device, key, candidates(costs, BOTH, REACH, FEW_SEEDS), run)
        operator.repeat_draws()  # as if nothing had been evaluated
        plan = Plan(won, MEASURED, None, others(won, BOTH, costs.rows, costs.columns))
        return bounded(plan, costs, check_memory("Autotune", self.memory))

    def plan_samples(
        self, operator: JacobianOperator, samples: SampledWays, run: Callable[[Swept, Chunk], Any]
    ) -> tuple[Plan, Chunk]:
        """The same for a batch of samples, of which the operator is one; ``run`` takes them all."""
        costs = counted_costs(operator)
        operator.repeat_draws()  # the samples draw as if none had been evaluated before
        if costs is None:
            return rows_first(by_sizes(operator, BOTH), operator), None
        memory, size = check_memory("Autotune", self.memory), samples.size
        every, ways = costs.times(size, samples.are_copied), samples.ways(BOTH, BY_LAYERS)
        forecast = rows_first(fastest(every, ways), operator)
        plan, chunk = bounded_samples(forecast, costs, size, memory)
        if chunk is not None:  # memory decides, not time
            return plan, chunk
        key = f"{_key(operator)} × {size}{' copied' * samples.are_copied}"
        won, device = self._won(operator, key), _device(operator)
        if won is None:
            possible = dict.fromkeys(
                (*candidates(every, ways, REACH, FEW_SEEDS), fewer_rows(every))
            )
            try:
                won = self._measure(device, key, possible, lambda strategy: run(strategy, None))
            except Refused:  # all of them are: whoever runs the plan goes on from there
                return plan, chunk
        operator.repeat_draws()
        plan = Plan(won, MEASURED, None, others(won, ways, costs.rows, costs.columns))
        return rows_first(plan, operator), None

    def _won(self, operator: JacobianOperator, key: str) -> Swept | None:
        return winners(self._file()).get(_device(operator), key)

    def _measure(
        self,
        device: torch.device,
        key: str,
        strategies: Iterable[Swept],
        run: Callable[[Swept], Any],
    ) -> Swept:
        times = _measured(list(strategies), run, device)
        best = min(times, key=times.__getitem__)
        winners(self._file()).put(device, key, best, times[best])
        note("measured: %s", ", ".join(f"{s} {in_seconds(t)}" for s, t in times.items()))
        return best

    def _file(self) -> Path | None:
        return None if self.cache is None else Path(self.cache).expanduser().resolve()


def _key(operator: JacobianOperator) -> str:
    called, kind, _ = operator.call_kind
    # a module is called through functions of ours, whose code may change with each version
    about = fingerprint(called if isinstance(called, nn.Module) else operator.func), kind
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _device(operator: JacobianOperator) -> torch.device:
    return operator.primals[0].device if operator.primals else torch.device("cpu")


def _materialized(operator: JacobianOperator, strategy: Swept) -> Blocks:
    fresh = operator.again()
    fresh.repeat_draws()
    return strategy.materialize(fresh)


def _measured(
    strategies: Sequence[Swept], run: Callable[[Swept], Any], device: torch.device
) -> dict[Swept, float]:
    """Median seconds of those that held out to the last round."""
    first: dict[Swept, float] = {}
    for strategy in strategies:  # what torch sets up on first use is nobody's cost
        try:
            first[strategy] = seconds_of(partial(run, strategy), device)
        except Refused as refusal:
            note("%s was refused: %s", strategy, refusal)
            if strategy == strategies[-1] and not first:
                raise
    least = min(first.values())
    times: dict[Swept, list[float]] = {
        s: [] for s, took in first.items() if took <= max(SLOW_START * least, SETTING_UP)
    }
    start = time.perf_counter()
    for number, turns in enumerate(shuffled(times, ROUNDS), 1):
        for strategy in turns:
            times[strategy].append(seconds_of(partial(run, strategy), device))
        least = min(map(min, times.values()))
        for strategy in turns:
            if min(times[strategy]) > HOPELESS * least:
                del times[strategy]
        if number >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    return {strategy: statistics.median(seconds) for strategy, seconds in times.items()}
