"""Who takes part: every strategy, and torch's own recipe; and who need not try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jacfunc._assembly import Sink
from jacfunc._calls import Derivation
from jacfunc._forecasting import CallForecast, Costs, Swept, counted_costs, is_forward
from jacfunc._linear_map import JacobianOperator, one_sample
from jacfunc._log import note
from jacfunc._measuring import Contestant, Expected, Result, Run
from jacfunc._memory import free_bytes, largest
from jacfunc._planning import SHARE, resolve
from jacfunc._torch import RandomState
from jacfunc._types import Memory
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._reference import Plain, baseline_of, by_recipe
from jacfunc.strategies import Looped, Reverse, Strategy, Structured

STRATEGIES: tuple[str | Strategy, ...] = (
    "auto",
    "autotune",
    "reverse",
    Reverse(chunk_size=8),
    Reverse(chunk_size=64),
    Reverse(chunk_size=512),
    "forward",
    "looped",
    "structured",
)
"""In the order of the table; of those that take as long the first is recommended."""

PLANNED = ("auto", "autotune")
"""Those that are given the memory that they are to keep to."""

LONG, FAR = 60.0, 20.0
"""A call is not tried that is forecast to take so many seconds, and so many times the shortest."""


@dataclass(frozen=True)
class Sizes:
    """Of the Jacobian: of each sample its rows and columns, of all samples its bytes."""

    samples: int
    rows: int
    columns: int
    result_bytes: int

    @classmethod
    def of(cls, problem: Problem, plain: Plain) -> Sizes:
        """From one sample evaluated."""
        sample = plain.try_out()
        rows = sum(out.numel() for out in sample.outputs)
        columns = sum(shape.numel() for shape in sample.shapes)
        bytes_each = max(dtype.itemsize for dtype in problem.dtypes)
        return cls(plain.size, rows, columns, plain.size * rows * columns * bytes_each)

    def __str__(self) -> str:
        each = "" if self.samples == 1 else "each "
        return f"{each}{self.rows:,} × {self.columns:,}, {in_bytes(self.result_bytes)} in all"

    def check(self, device: torch.device) -> None:
        """It must fit, or nobody could take it."""
        free = free_bytes(device)
        if self.result_bytes > free:
            raise ValueError(
                f"{API}: the Jacobian must fit in memory, got {in_bytes(self.result_bytes)} where "
                f"{in_bytes(free)} are free. Compare on fewer samples; then take it in parts with "
                "jacfunc.stream_jacobian, or products alone (jacfunc.jvp, vjp, ntk, ggn); where "
                "it does fit, memory= keeps the rest small."
            )


def name_of(strategy: str | Strategy) -> str:
    """As it is written after ``strategy=``, but for the quotes."""
    return strategy if isinstance(strategy, str) else repr(strategy)


def by_jacfunc(strategy: str | Strategy, memory: Memory, problem: Problem) -> Run:
    return problem.jacobian(strategy, memory if strategy in PLANNED else None)


def repeating(draws: RandomState, prepare: Callable[[Problem], Run], problem: Problem) -> Run:
    """Every call draws the same random numbers, those of the reference."""
    run = prepare(problem)

    def repeated() -> Any:
        draws.repeat()
        return run()

    return repeated


def contestants(
    problem: Problem,
    sizes: Sizes,
    strategies: Sequence[str | Strategy],
    memory: Memory,
    is_random: bool,
) -> tuple[list[Contestant[Problem]], list[Result]]:
    """Those who take part, and those who can't, with the reason."""
    draws, outlook = RandomState(problem.samples()[0].leaves), Outlook(problem, sizes)
    chosen = [strategy for strategy in strategies if _concerns(strategy, problem, sizes)]
    told = {name_of(strategy): outlook.of(strategy) for strategy in chosen}
    shortest = min((f.seconds for f in told.values() if f and f.seconds), default=0.0)
    # torch's way is a reverse sweep, too
    ways = [(baseline_of(problem), "torch.func", by_recipe, "reverse"), *map(_ours(memory), chosen)]
    entrants, absent = [], []
    for name, family, prepare, strategy in ways:
        obstacle = outlook.obstacle(strategy, told.get(name_of(strategy)), shortest)
        if obstacle is not None:
            absent.append(Result(name, family, obstacle, forecast=told.get(name)))
            continue
        taken = partial(repeating, draws, prepare) if is_random else prepare
        forecast = partial(_known, told.get(name))
        entrants.append(Contestant(name, family, taken, forecast=forecast))
    return entrants, absent


Way = tuple[str, str, Callable[[Problem], Run], str | Strategy]


def _ours(memory: Memory) -> Callable[[str | Strategy], Way]:
    def way(strategy: str | Strategy) -> Way:
        return name_of(strategy), "jacfunc", partial(by_jacfunc, strategy, memory), strategy

    return way


def _known(forecast: Expected | None, _: Problem) -> Expected | None:
    return forecast


def _concerns(strategy: str | Strategy, problem: Problem, sizes: Sizes) -> bool:
    """Layers hold parameters; a chunk of all rows is no chunk."""
    chunk = getattr(strategy, "chunk_size", None)
    fits = not isinstance(chunk, int) or chunk < sizes.rows
    return fits and (strategy != "structured" or problem.by_params)


class Outlook:
    """What strategies would take, where that can be said beforehand.

    A function is foretold as :func:`jacfunc.estimate` does, its peak included. Of a module one
    sample is evaluated, and the seconds are those by which auto chooses.
    """

    def __init__(self, problem: Problem, sizes: Sizes) -> None:
        self._sizes, self._device = sizes, problem.device
        self._teller: CallForecast | None = None
        self._one: Costs | None = None
        try:
            if problem.module is None:
                args, kwargs = problem.args, dict(problem.kwargs)
                derivation = Derivation(API, problem.target, problem.argnums)
                self._teller = CallForecast(derivation, args, kwargs)
            else:
                self._one = _costs_of_one(problem)
        except Exception as error:  # the measured rows will say what is wrong; there is no forecast
            note("nothing is forecast: %s", error)

    def of(self, strategy: str | Strategy) -> Expected | None:
        """Seconds and peak bytes; of auto and autotune nothing."""
        swept = resolve(API, strategy, None)
        if not isinstance(swept, Swept):
            return None
        if self._teller is not None:
            told = self._teller.forecast(swept)
            return Expected(told.seconds, told.peak_bytes)
        if self._one is None:
            return None
        if isinstance(swept, Looped):
            return Expected(self._sizes.samples * self._one.seconds(swept), None)
        return Expected(self._one.times(self._sizes.samples).seconds(swept), None)

    def obstacle(
        self, strategy: str | Strategy, told: Expected | None, shortest: float
    ) -> str | None:
        """Why it should not be tried: a process that is killed has no table."""
        swept, free = resolve(API, strategy, None), free_bytes(self._device)
        if told is None or not isinstance(swept, Swept):
            return None
        if told.peak_bytes is not None and told.peak_bytes > free:
            return f"out of memory: forecast {in_bytes(told.peak_bytes)}, {in_bytes(free)} free"
        least = self._least_bytes(swept)
        if least > SHARE * free:
            return f"out of memory: forecast {in_bytes(least)} at least, {in_bytes(free)} free"
        if told.seconds is not None and told.seconds > max(LONG, FAR * shortest):
            return f"out of time: forecast {in_seconds(told.seconds)} a call"
        return None

    def _least_bytes(self, swept: Swept) -> int:
        """The products of a module's largest operation with all seeds of a sweep."""
        if self._one is None or isinstance(swept, Looped):
            return 0
        every = self._one.times(self._sizes.samples)
        seeds = largest(swept.chunk_size, every.seeds(swept))
        if is_forward(swept):
            sizes = [op.written for op in every.operations]
        else:
            layers = isinstance(swept, Structured)
            sizes = [op.read - op.held if layers else op.read for op in every.operations]
        return seeds * max(sizes, default=0)


def _costs_of_one(problem: Problem) -> Costs | None:
    """Of one sample, or of the whole, evaluated as jacfunc does."""
    call = problem.call()
    with call.undisturbed():
        if problem.is_sampled:
            batch = call.batch(Sink(), problem.in_dims, problem.randomness)
            flat = batch.call_of(one_sample(batch.leaves, batch.dims, 0))
        else:
            flat = call.flat_call(call.arguments, None)
        return counted_costs(JacobianOperator(flat, flat.primals))
