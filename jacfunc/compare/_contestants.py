"""Who takes part: every strategy, and torch's own recipe; and who need not try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jacfunc._measuring import Contestant, Result, Run
from jacfunc._memory import free_bytes
from jacfunc._torch import RandomState
from jacfunc._types import Memory
from jacfunc._units import in_bytes
from jacfunc.compare._forecasts import UNKNOWN, needs_of, obstacle
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._reference import Reference, baseline_of, by_recipe
from jacfunc.strategies import Reverse, Strategy

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
"""In the order of the table; of strategies that take as long the first is recommended."""

PLANNED = ("auto", "autotune")
"""Strategies that keep to a memory."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the Jacobian: rows and columns of each sample, bytes of all samples."""

    samples: int
    rows: int
    columns: int
    result_bytes: int

    @classmethod
    def of(cls, problem: Problem, reference: Reference) -> Sizes:
        """The sizes that one sample of the reference shows."""
        sample = reference.try_out()
        rows = sum(out.numel() for out in sample.outputs)
        columns = sum(shape.numel() for shape in sample.shapes)
        itemsize = max(dtype.itemsize for dtype in problem.dtypes)
        return cls(reference.size, rows, columns, reference.size * rows * columns * itemsize)

    def __str__(self) -> str:
        each = "" if self.samples == 1 else "each "
        return f"{each}{self.rows:,} × {self.columns:,}, {in_bytes(self.result_bytes)} in all"

    def check(self, device: torch.device) -> None:
        """Refuse a Jacobian that does not fit in memory: nobody could take it."""
        free = free_bytes(device)
        if self.result_bytes > free:
            raise ValueError(
                f"{API}: the Jacobian must fit in memory, got {in_bytes(self.result_bytes)} where "
                f"{in_bytes(free)} are free. Compare on fewer samples; then take it in parts with "
                "jacfunc.stream_jacobian, or products alone (jacfunc.jvp, vjp, ntk, ggn); where "
                "it does fit, memory= keeps the rest small."
            )


def name_of(strategy: str | Strategy) -> str:
    """The strategy as it is written after ``strategy=``, but for the quotes."""
    return strategy if isinstance(strategy, str) else repr(strategy)


def contestants(
    problem: Problem,
    sizes: Sizes,
    strategies: Sequence[str | Strategy],
    memory: Memory,
    is_random: bool,
) -> tuple[list[Contestant[Problem]], list[Result]]:
    """Who takes part; and results of those who need not try, with the reason."""
    chosen = {name_of(s): s for s in strategies if _concerns(s, problem, sizes)}
    needs = dict(zip(chosen, needs_of(problem, [*chosen.values()]), strict=True))
    shortest = min((seconds for seconds, _, _ in needs.values() if seconds), default=0.0)
    random_state = RandomState(problem.samples()[0].leaves)
    entrants, absent = [], []
    for name in (baseline := baseline_of(problem), *chosen):
        is_baseline = name == baseline
        family = "torch.func" if is_baseline else "jacfunc"
        prepare = by_recipe if is_baseline else partial(by_jacfunc, chosen[name], memory)
        seconds, peak, _ = needs.get(name, UNKNOWN)
        # torch's own recipe is a reverse sweep, too
        reason = obstacle(needs.get("reverse" if is_baseline else name, UNKNOWN), problem, shortest)
        if reason is not None:
            absent.append(
                Result(name, family, reason, forecast_seconds=seconds, forecast_bytes=peak)
            )
            continue
        if is_random:
            prepare = partial(repeating, random_state, prepare)
        entrants.append(
            Contestant(name, family, prepare, forecast=partial(_known, (seconds, peak)))
        )
    return entrants, absent


def _known(
    expected: tuple[float | None, int | None], problem: Problem
) -> tuple[float | None, int | None]:
    return expected


def by_jacfunc(strategy: str | Strategy, memory: Memory, problem: Problem) -> Run:
    """The call by jacfunc; the memory is for strategies that plan."""
    return problem.jacobian(strategy, memory if strategy in PLANNED else None)


def repeating(
    random_state: RandomState, prepare: Callable[[Problem], Run], problem: Problem
) -> Run:
    """A run of which every call draws the random numbers of the reference."""
    run = prepare(problem)

    def repeated() -> Any:
        random_state.repeat()
        return run()

    return repeated


def _concerns(strategy: str | Strategy, problem: Problem, sizes: Sizes) -> bool:
    """Layers hold parameters; a chunk of all rows is no chunk."""
    chunk = getattr(strategy, "chunk_size", None)
    fits = not isinstance(chunk, int) or chunk < sizes.rows
    return fits and (strategy != "structured" or problem.by_params)
