"""Kernels, curvature and reused buffers: what layer factors win, beside recipes and rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text

from benchmarks import buffers, curvature, kernels, measuring
from benchmarks.contestants import Contestant
from benchmarks.measuring import Result
from benchmarks.networks import CLASSES, LARGE, LENET, PIXELS, RECURRENT, SHORT, build
from benchmarks.presenting import size, spread
from benchmarks.workloads import Answer, Problem, Suite

SUITE, FEWEST = Suite(batch=64, rounds=20, seconds=4.0), 2
"""Seconds a contestant a case; one that takes longer has the fewest rounds."""


@dataclass(frozen=True)
class Quantity:
    """What is computed, by whom, and its right value; the first contestant is ours."""

    contestants: tuple[Contestant, ...]
    expected: Callable[[Problem], Answer]

    @property
    def ours(self) -> str:
        return self.contestants[0].name


@dataclass(frozen=True)
class Wanted:
    """A bound on our time beside the fastest of others, or on our peak beside the bytes of J."""

    kind: Literal["times faster than", "time ÷", "peak ÷ J"]
    bound: float
    others: tuple[str, ...] = ()

    @property
    def is_least(self) -> bool:
        return self.kind == "times faster than"


@dataclass(frozen=True)
class Target:
    """What was wanted and what came out; nothing, where that cannot be said here."""

    what: str
    wanted: str
    found: float | None
    met: bool | None


@dataclass(frozen=True)
class Case:
    """A quantity of a network, and what is wanted of it."""

    quantity: str
    network: str
    wanted: tuple[Wanted, ...] = ()
    batch: int = SUITE.batch

    @property
    def name(self) -> str:
        return f"{self.quantity}, {self.network}, B={self.batch}"

    def problem(self, device: torch.device) -> Problem:
        """Noise for images: no time depends on what is in them."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 1, PIXELS, PIXELS, generator=generator)
        return Problem(build(self.network).to(device), images.to(device), "params")


NTK, BUFFER, DIAGONAL, PRODUCT = "NTK", "J into a buffer", "GGN diagonal", "GGN product"
QUANTITIES = {
    NTK: Quantity(kernels.CONTESTANTS, kernels.expected),
    BUFFER: Quantity(buffers.CONTESTANTS, buffers.expected),
    DIAGONAL: Quantity(curvature.DIAGONAL, curvature.expected_diagonal),
    PRODUCT: Quantity(curvature.PRODUCT, curvature.expected_product),
}


def _faster(bound: float, *others: str) -> Wanted:
    return Wanted("times faster than", bound, others)


def _within(bound: float, *others: str) -> Wanted:
    return Wanted("time ÷", bound, others)


_RECIPES = (kernels.MATMUL, kernels.CONTRACTION, kernels.PRODUCTS)
_AHEAD = _faster(1, kernels.TORCHJD)
_PRODUCT = (_within(1.0, curvature.CURVLINOPS),)

CASES = (
    Case(NTK, LARGE, (_faster(200, *_RECIPES), _AHEAD, Wanted("peak ÷ J", 0.05))),
    Case(NTK, LENET, (_faster(8, *_RECIPES), _AHEAD)),
    Case(NTK, "transformer", (_faster(1, *_RECIPES), _AHEAD, Wanted("peak ÷ J", 0.4))),
    Case(NTK, SHORT, (_faster(1.2, *_RECIPES), _AHEAD, Wanted("peak ÷ J", 0.4))),
    Case(NTK, RECURRENT),
    *(Case(NTK, network, batch=8) for network in (LARGE, LENET, "transformer")),
    Case(BUFFER, LARGE, (_within(1.3, buffers.FILL), _faster(5, buffers.RECIPE))),
    Case(BUFFER, LENET, (_faster(1.8, buffers.RECIPE),)),
    Case(BUFFER, "transformer", (_faster(1.4, buffers.RECIPE),)),
    Case(
        DIAGONAL,
        LARGE,
        (_faster(1.4, curvature.BACKPACK), _faster(100, curvature.MATERIALIZED)),
    ),
    Case(DIAGONAL, LENET, (_faster(1.2, curvature.BACKPACK), _faster(4, curvature.MATERIALIZED))),
    Case(DIAGONAL, "transformer"),
    Case(PRODUCT, LARGE, _PRODUCT),
    Case(PRODUCT, LENET, _PRODUCT),
    Case(PRODUCT, "transformer", _PRODUCT),
)


def measure(case: Case, device: torch.device) -> list[Result]:
    """Answers first, then rounds, then peaks; ratios are to our own time."""
    problem, quantity = case.problem(device), QUANTITIES[case.quantity]
    with warnings.catch_warnings():
        # hooks and missing batching rules are warned about; what they cost is in the table
        warnings.simplefilter("ignore")
        expected = quantity.expected(problem)
        results = measuring.measure(
            problem,
            quantity.contestants,
            expected,
            SUITE,
            baseline=quantity.ours,
            fewest=FEWEST,
        )
    for result in results:
        if result.family == "JAX":
            # only what torch allocates is counted
            result.peak_bytes = None
    return results


def targets(case: Case, results: Sequence[Result]) -> list[Target]:
    """What was wanted of us in this case."""
    by_name = {result.contestant: result for result in results}
    ours = by_name[QUANTITIES[case.quantity].ours]
    return [_target(wanted, ours, by_name, _bytes_of_j(case)) for wanted in case.wanted]


def _target(wanted: Wanted, ours: Result, by_name: dict[str, Result], whole: int) -> Target:
    times = {name: by_name[name].ratio for name in wanted.others if by_name[name].ok}
    medians = {name: ratio.median for name, ratio in times.items() if ratio}
    best = min(medians, key=medians.__getitem__, default="")
    found = None
    if wanted.kind == "peak ÷ J" and ours.ok and ours.peak_bytes:
        found = ours.peak_bytes / whole
    elif best:
        found = medians[best] if wanted.is_least else 1 / medians[best]
    met = None
    if found is not None:
        met = found >= wanted.bound if wanted.is_least else found <= wanted.bound
    elif not ours.ok:
        met = False
    what = f"{wanted.kind} {best or ' | '.join(wanted.others)}".strip()
    return Target(what, f"{'≥' if wanted.is_least else '≤'} {wanted.bound:g}", found, met)


def _bytes_of_j(case: Case) -> int:
    parameters = sum(param.numel() * param.itemsize for param in build(case.network).parameters())
    return case.batch * CLASSES * parameters


def table(case: Case, results: Sequence[Result]) -> Table:
    """Contestants of one case; our row is green where it keeps to all its targets, else red."""
    found = targets(case, results)
    notes = [_line(target) for target in found]
    notes += [f"{result.contestant}: {result.status}" for result in results if not result.ok]
    shown = Table(
        title=case.name,
        caption=Text("\n".join(notes)),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("contestant", no_wrap=True)
    for heading in ("time ÷ ours", "time, ms", "rounds", "peak", "peak ÷ J", "max error"):
        shown.add_column(heading, justify="right")
    whole = _bytes_of_j(case)
    for number, result in enumerate(results):
        missed = not result.ok or (number == 0 and any(target.met is False for target in found))
        style = "red" if missed else "green" if number == 0 else ""
        shown.add_row(*_cells(result, whole), style=style)
    return shown


def _cells(result: Result, whole: int) -> list[str]:
    if not result.ok:
        return [result.contestant, result.status.partition(":")[0]]
    return [
        result.contestant,
        spread(result.ratio),
        spread(result.time, 1e3),
        str(len(result.seconds)),
        size(result.peak_bytes),
        "-" if result.peak_bytes is None else f"{result.peak_bytes / whole:.3f}",
        "-" if result.error is None else f"{result.error:.0e}",
    ]


def _line(target: Target) -> str:
    verdict = {True: "met", False: "missed", None: "not known"}[target.met]
    found = "-" if target.found is None else f"{target.found:.3g}"
    return f"{verdict}: {target.what}: {found}, wanted {target.wanted}"


def as_record(case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """A case as plain data, times by round included."""
    return {
        "bytes_of_j": _bytes_of_j(case),
        "targets": [asdict(target) for target in targets(case, results)],
        "results": [asdict(result) for result in results],
    }
