"""Who takes part in a comparison: every strategy, and torch's own recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def concerns(strategy: str | Strategy, problem: Problem, sizes: Sizes) -> bool:
    """Whether a strategy differs from others here: layers have parameters, chunks fewer rows."""
    chunk = getattr(strategy, "chunk_size", None)
    is_chunked = not isinstance(chunk, int) or chunk < sizes.rows
    return is_chunked and (strategy != "structured" or problem.by_params)


def contestants(
    problem: Problem, strategies: Sequence[str | Strategy], memory: Memory, is_random: bool
) -> list[Contestant[Problem]]:
    """Torch's own recipe, then the strategies, each with the random numbers of the reference."""
    random_state = RandomState(problem.samples()[0].leaves)
    ways = [(baseline_of(problem), "torch.func", by_recipe)]
    ways += [(name_of(s), "jacfunc", partial(by_jacfunc, s, memory)) for s in strategies]
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
