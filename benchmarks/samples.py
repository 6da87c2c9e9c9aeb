"""Per-sample parameter Jacobians ``[B, C, P]``: jacfunc beside the recipe and other libraries."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from benchmarks.measuring import (
    FEWEST_ROUNDS,
    Result,
    interleaved,
    peak_bytes,
    recording,
    summarize,
)
from benchmarks.networks import NETWORKS, PIXELS, build
from benchmarks.presenting import size, spread
from benchmarks.reference import WrongAnswerError, check, reference
from benchmarks.rivals import (
    CONCATENATED,
    FLAT,
    LAPLACE,
    OURS,
    RECIPE,
    RIVALS,
    WHOLE_BATCH,
    Rival,
    Run,
)
from benchmarks.workloads import Answer, Problem

BATCHES = (8, 64)
ROUNDS, SECONDS = 30, 12.0
"""At most, for all rivals of a case together."""

HOPELESS = 20.0
"""A rival that is slower than the recipe by this factor is timed once."""

TIME, PEAK, LAPLACE_TIME = 1.0, 0.6, 0.1
"""Largest wanted: our time ÷ the recipe's, the peak of flat ÷ that of the recipe with its
concatenation, and, at the largest batch, the time of flat ÷ that of Laplace's way."""


@dataclass(frozen=True)
class Case:
    """A network and how many samples."""

    network: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network}, B={self.batch}"

    def problem(self, device: torch.device) -> Problem:
        """Noise for images: no time depends on what is in them."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 1, PIXELS, PIXELS, generator=generator)
        return Problem(build(self.network).to(device), images.to(device), "params")


@dataclass(frozen=True)
class Target:
    """What was wanted of a rival and what came out; nothing, where it or the other failed."""

    rival: str
    what: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool:
        return self.found is not None and self.found <= self.wanted


def cases() -> Iterator[Case]:
    """Every network with few samples, then with many."""
    for network in NETWORKS:
        for batch in BATCHES:
            yield Case(network, batch)


def measure(case: Case, device: torch.device, rivals: Sequence[Rival] = RIVALS) -> list[Result]:
    """Answers first, then the peak of an untimed call, then rounds."""
    problem = case.problem(device)
    results = {rival.name: Result(rival.name, rival.form) for rival in rivals}
    runs: dict[str, Run] = {}
    with warnings.catch_warnings():
        # hooks and missing batching rules are warned about; what they cost is in the table
        warnings.simplefilter("ignore")
        expected = reference(problem)
        for rival in rivals:
            result = results[rival.name]
            with recording(result):
                own = Problem(copy.deepcopy(problem.model), problem.images, problem.wrt)
                run = rival.prepare(own)
                result.error = _check(run(), expected, rival.form)
                result.peak_bytes = peak_bytes(run, problem.cuda())
                runs[rival.name] = _guarded(result, run)
        del expected
        _time(runs, results, problem.cuda())
    summarize(results, RECIPE)
    return list(results.values())


def _guarded(result: Result, run: Run) -> Run:
    """A failure in a round is the result, too."""

    def guarded() -> Any:
        with recording(result):
            return run()

    return guarded


def _time(runs: Mapping[str, Run], results: Mapping[str, Result], cuda: bool) -> None:
    """One round of all, then more of those that are not hopeless."""
    once = {name: found for name, (found,) in interleaved(runs, 1, cuda).items()}
    longest = HOPELESS * once.get(RECIPE, math.inf)
    going = {name: run for name, run in runs.items() if once[name] <= longest}
    fit = int(SECONDS / sum(once[name] for name in going))
    later = interleaved(going, max(FEWEST_ROUNDS, min(ROUNDS, fit)) - 1, cuda)
    for name, first in once.items():
        results[name].seconds = dict(enumerate([first, *later.get(name, ())]))


def _check(answer: Any, expected: Answer, form: str) -> float:
    if form == "flat":
        lengths = [block[0, 0].numel() for block in expected.values()]
        lead = next(iter(expected.values())).shape[:2]
        if not isinstance(answer, Tensor) or answer.shape != (*lead, sum(lengths)):
            raise WrongAnswerError(f"not one tensor of shape {(*lead, sum(lengths))}")
        pieces = zip(expected.items(), answer.split(lengths, -1), strict=True)
        answer = {name: piece.reshape(block.shape) for (name, block), piece in pieces}
    return check(answer, expected)


def targets(case: Case, results: Sequence[Result]) -> list[Target]:
    """What was wanted of jacfunc in this case."""
    by_name = {result.contestant: result for result in results}
    laplace = LAPLACE if by_name[LAPLACE].ok else WHOLE_BATCH

    def took(name: str) -> float | None:
        ratio = by_name[name].ratio
        return ratio.median if ratio else None

    found = [Target(n, f"time ÷ {RECIPE}", TIME, took(n)) for n in (OURS, FLAT)]
    peak = _peak_ratio(by_name[FLAT], by_name[CONCATENATED])
    found.append(Target(FLAT, f"peak ÷ {CONCATENATED}", PEAK, peak))
    if case.batch == max(BATCHES):
        ours, theirs = took(FLAT), took(laplace)
        share = ours / theirs if ours and theirs else None
        found.append(Target(FLAT, f"time ÷ {laplace}", LAPLACE_TIME, share))
    return found


def _peak_ratio(result: Result, base: Result) -> float | None:
    if not result.ok or not result.peak_bytes or not base.peak_bytes:
        return None
    return result.peak_bytes / base.peak_bytes


def table(case: Case, results: Sequence[Result]) -> Table:
    """Rivals of one case; jacfunc's rows are green where they keep to their targets, else red."""
    wanted = targets(case, results)
    notes = [_line(target) for target in wanted]
    notes += [f"{result.contestant}: {result.status}" for result in results if not result.ok]
    shown = Table(
        title=case.name,
        caption=Text("\n".join(notes)),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("rival", no_wrap=True)
    shown.add_column("form")
    for heading in ("time × recipe", "time, ms", "rounds", "peak", "peak ratio", "max error"):
        shown.add_column(heading, justify="right")
    base = next(result for result in results if result.contestant == CONCATENATED)
    for result in results:
        own = [target.met for target in wanted if target.rival == result.contestant]
        style = "" if result.ok and not own else "green" if result.ok and all(own) else "red"
        shown.add_row(*_cells(result, base), style=style)
    return shown


def _cells(result: Result, base: Result) -> list[str]:
    if not result.ok:
        return [result.contestant, result.family, result.status.partition(":")[0]]
    share = _peak_ratio(result, base)
    return [
        result.contestant,
        result.family,
        spread(result.ratio),
        spread(result.time, 1e3),
        str(len(result.seconds)),
        size(result.peak_bytes),
        "-" if share is None else f"{share:.2f}",
        "-" if result.error is None else f"{result.error:.0e}",
    ]


def _line(target: Target) -> str:
    found = "not known" if target.found is None else f"{target.found:.2f}"
    verdict = "met" if target.met else "missed"
    return f"{verdict}: {target.rival}, {target.what}: {found}, wanted ≤ {target.wanted}"


def as_record(case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """A case as plain data, times by round included."""
    base = next(result for result in results if result.contestant == CONCATENATED)
    return {
        "parameters": sum(param.numel() for param in build(case.network).parameters()),
        "targets": [{**asdict(t), "met": t.met} for t in targets(case, results)],
        "results": [{**asdict(r), "peak_ratio": _peak_ratio(r, base)} for r in results],
    }
