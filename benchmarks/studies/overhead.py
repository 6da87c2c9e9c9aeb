"""What jacfunc's own Python costs: small MLPs against torch.func, where sweeps are cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import jacfunc
from benchmarks.problems import formulas
from jacfunc._measuring.clock import seconds
from jacfunc._measuring.results import Spread, spread

SIZES = (4, 16, 64, 256)
WIDTH = 64
BATCH = 8
ROUNDS = 100
TARGETS = {"top level": 0.75, "vmap": 1.10}
"""Largest wanted ratio of jacfunc's time to torch.func's."""


@dataclass(frozen=True)
class Pair:
    """jacfunc's and torch.func's call of the same Jacobian."""

    level: str
    inputs: int
    outputs: int
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


@dataclass(frozen=True)
class Overhead:
    """Our time over theirs, round by round."""

    level: str
    inputs: int
    outputs: int
    ratio: Spread
    ours: Spread
    theirs: Spread


def pairs(device: torch.device) -> Iterator[Pair]:
    """Reverse mode of MLPs n - 64 - 64 - m, at the top level and vmapped over a batch."""
    draw = formulas.drawing(torch.float32, device)
    for inputs in SIZES:
        for outputs in SIZES:
            func, x = formulas.mlp(inputs, outputs, WIDTH, draw)
            ours, theirs = jacfunc.jacrev(func), torch.func.jacrev(func)
            yield _pair("top level", x, outputs, ours, theirs)
            ours, theirs = torch.func.vmap(ours), torch.func.vmap(theirs)
            yield _pair("vmap", draw(BATCH, inputs), outputs, ours, theirs)


def _pair(
    level: str, x: Tensor, outputs: int, ours: Callable[..., Any], theirs: Callable[..., Any]
) -> Pair:
    return Pair(level, x.shape[-1], outputs, lambda: ours(x), lambda: theirs(x))


def measure(pair: Pair, cuda: bool, rounds: int = ROUNDS) -> Overhead:
    """The pair checked against each other, then timed in turns; who goes first alternates."""
    torch.testing.assert_close(pair.ours(), pair.theirs(), rtol=1e-4, atol=1e-5)
    for _ in range(5):
        pair.ours(), pair.theirs()
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(rounds):
        turns = [(pair.ours, ours), (pair.theirs, theirs)]
        for run, times in turns if number % 2 else reversed(turns):
            times.append(seconds(run, cuda))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Overhead(pair.level, pair.inputs, pair.outputs, *map(Spread.of, (ratios, ours, theirs)))


def table(level: str, results: list[Overhead]) -> Table:
    """Ratios by inputs and outputs; those above the target stand out."""
    target = TARGETS[level]
    above = sum(result.ratio.median > target for result in results)
    shown = Table(
        title=f"jacfunc.jacrev ÷ torch.func.jacrev, {level}",
        caption=f"Median of {ROUNDS} rounds (quartiles). Target ≤ {target:.2f}: "
        f"{above} of {len(results)} above it.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("inputs \\ outputs", justify="right")
    for outputs in SIZES:
        shown.add_column(str(outputs), justify="right")
    for inputs in SIZES:
        row = [result for result in results if result.inputs == inputs]
        cells = [(spread(result.ratio), result.ratio.median > target) for result in row]
        shown.add_row(str(inputs), *(f"[red]{text}[/]" if high else text for text, high in cells))
    return shown
