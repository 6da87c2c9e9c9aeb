"""Jacobians under a tenth of the memory that they would take: bytes counted, time beside chunks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import jacfunc
from benchmarks.problems import formulas
from jacfunc._measuring.clock import interleaved, peak_bytes
from jacfunc._units import in_bytes

CHUNKS = (8, 16, 32, 64, 128, 256)
SHARE = 10
"""The budget is the unchunked peak divided by this."""

ROUNDS = 7
TARGET = 1.3

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """``within(memory)`` keeps to a budget, ``chunked(size)`` to a chunk; None for neither."""

    name: str
    within: Callable[[int | None], Run]
    chunked: Callable[[int], Run]


@dataclass(frozen=True)
class Budgeted:
    """One case: what was allowed and taken, and the time beside the best chunk picked by hand."""

    case: str
    unchunked: int
    budget: int
    taken: int
    best_chunk: int
    seconds: float
    best_seconds: float
    ratio: float


def cases(device: torch.device) -> Iterator[Case]:
    """A transform each, on functions whose intermediate results dwarf the Jacobian."""
    draw = formulas.drawing(torch.float32, device)
    wide, tall, square = draw(1500, 30) / 6, draw(800, 1500) / 40, draw(1500, 200) / 14
    for name, derive, func, x in (
        ("jacrev", jacfunc.jacrev, lambda x: tall @ torch.tanh(torch.sin(wide @ x)), draw(30)),
        ("jacfwd", jacfunc.jacfwd, lambda x: wide.T @ torch.tanh(tall.T @ x), draw(800)),
        ("hessian", jacfunc.hessian, lambda x: torch.tanh(square @ x).square().sum(), draw(200)),
    ):
        yield _of_function(name, derive, func, x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 10)).to(device)
    yield _of_samples(model, draw(128, 64))


def _of_function(name: str, derive: Any, func: Any, x: Tensor) -> Case:
    def within(memory: int | None) -> Run:
        return partial(derive(func, memory=memory), x)

    def chunked(chunk: int) -> Run:
        return partial(derive(func, chunk_size=chunk), x)

    return Case(name, within, chunked)


def _of_samples(model: nn.Module, x: Tensor) -> Case:
    def within(memory: int | None) -> Run:
        derive = jacfunc.module_jacobian(
            model, "inputs", per_sample=True, strategy="reverse", memory=memory
        )
        return partial(derive, x)

    def chunked(chunk: int) -> Run:
        whole = within(None).func  # type: ignore[attr-defined]
        return lambda: torch.cat([whole(piece) for piece in x.split(chunk)])

    return Case("per sample", within, chunked)


def measure(case: Case, device: torch.device) -> Budgeted:
    """Bytes counted first; then the budget and the chunks that keep to it, in rounds."""
    cuda = device.type == "cuda"
    unchunked = _peak(case.within(None), cuda)
    budget = unchunked // SHARE
    within = case.within(budget)
    taken = _peak(within, cuda)
    runs = {chunk: case.chunked(chunk) for chunk in CHUNKS}
    runs = {chunk: run for chunk, run in runs.items() if _peak(run, cuda) <= budget} | {0: within}
    times = interleaved(runs, ROUNDS, cuda)
    medians = {chunk: statistics.median(found) for chunk, found in times.items()}
    best = min((chunk for chunk in medians if chunk), key=medians.__getitem__)
    ratio = statistics.median(a / b for a, b in zip(times[0], times[best], strict=True))
    found = medians[0], medians[best], ratio
    return Budgeted(case.name, unchunked, budget, taken, best, *found)


def _peak(run: Run, cuda: bool) -> int:
    run()  # what torch allocates once is not the Jacobian's
    return peak_bytes(run, cuda)


def table(results: list[Budgeted]) -> Table:
    """What breaks its budget, or takes more than the target, stands out."""
    shown = Table(
        title=f"Under a {SHARE}th of the unchunked peak; time ÷ that of the best fixed chunk",
        caption=f"Wanted: within the budget, and at most {TARGET}×. Medians of {ROUNDS} rounds.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("case", "unchunked", "budget", "taken", "best chunk", "ms", "ratio"):
        shown.add_column(heading, justify="left" if heading == "case" else "right")
    for found in results:
        broken = found.taken > found.budget or found.ratio > TARGET
        shown.add_row(
            found.case,
            *map(in_bytes, (found.unchunked, found.budget, found.taken)),
            str(found.best_chunk),
            f"{found.seconds * 1e3:.3g}",
            f"{found.ratio:.2f}",
            style="red" if broken else "",
        )
    return shown
