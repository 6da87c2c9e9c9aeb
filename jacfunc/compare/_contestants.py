"""Who takes part in a comparison: every strategy, and torch's own recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jacfunc._measuring import Contestant, Run
from jacfunc._memory import free_bytes
from jacfunc._torch import RandomState
from jacfunc._types import Memory
from jacfunc._units import in_bytes
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
"""What is compared, in the order of the table; of those as fast, the first is recommended."""

PLANNED = ("auto", "autotune")
"""Strategies that plan, and so can keep to a memory budget."""


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


def strategies_for(
    problem: Problem, sizes: Sizes, strategies: Sequence[str | Strategy]
) -> dict[str, str | Strategy]:
    """Strategies by name, as they are written after ``strategy=``, but for the quotes.

    Those that would do what another does are left out: a chunk of all rows is no chunk, and only
    parameters are in layers.
    """
    chosen: dict[str, str | Strategy] = {}
    for strategy in strategies:
        chunk = getattr(strategy, "chunk_size", None)
        is_whole = isinstance(chunk, int) and chunk >= sizes.rows
        if not is_whole and (strategy != "structured" or problem.by_params):
            chosen[strategy if isinstance(strategy, str) else repr(strategy)] = strategy
    return chosen


def contestants(
    problem: Problem, strategies: Mapping[str, str | Strategy], memory: Memory, is_random: bool
) -> list[Contestant[Problem]]:
    """Torch's own recipe, then the strategies; random numbers are those of the reference."""
    random_state = RandomState(problem.samples()[0].leaves)
    ways = [(baseline_of(problem), "torch.func", by_recipe)]
    ways += [(n, "jacfunc", partial(by_jacfunc, s, memory)) for n, s in strategies.items()]
    return [
        Contestant(name, family, partial(repeating, random_state, way) if is_random else way)
        for name, family, way in ways
    ]


def by_jacfunc(strategy: str | Strategy, memory: Memory, problem: Problem) -> Run:
    """A call of jacfunc by a strategy; the memory is for strategies that plan."""
    return problem.jacobian(strategy, memory if strategy in PLANNED else None)


def repeating(
    random_state: RandomState, prepare: Callable[[Problem], Run], problem: Problem
) -> Run:
    """A run of which every call draws the same random numbers."""
    run = prepare(problem)

    def repeated() -> Any:
        random_state.repeat()
        return run()

    return repeated
