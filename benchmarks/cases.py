"""A question, its cases, and what is wanted in each: the rows of the benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.running.seats import Place, Together
from jacfunc._measuring.results import Result
from jacfunc._measuring.rounds import Check, Contestant, Effort, measure

ANSWER = "bytes of the answer"
"""The size that peaks are compared with where no contestant is named."""

USUAL = Effort()


@dataclass(frozen=True)
class Wanted:
    """A bound on the time of one contestant beside the fastest of others, or on its peak.

    Args:
        others: contestants; of a peak, the one whose peak it is divided by, or :data:`ANSWER`.
    """

    of: str
    kind: Literal["times faster than", "time ÷", "peak ÷"]
    bound: float
    others: tuple[str, ...]

    @property
    def is_least(self) -> bool:
        return self.kind == "times faster than"


@dataclass(frozen=True)
class Target:
    """What was wanted of whom and what came out; nothing, where that cannot be said here."""

    of: str
    what: str
    wanted: str
    found: float | None
    met: bool | None


@dataclass(frozen=True)
class Case:
    """One problem at one size, and who takes part.

    Args:
        setup: the problem on a device, with the same numbers every time.
        check: from the problem, what judges an answer.
        baseline: whose time is 1.
        sizes: by name: inputs, outputs, batch, parameters, :data:`ANSWER`.
        axis: the size that grows from case to case, where exponents are fitted.
        is_quick: it is part of the quick suite.
    """

    name: str
    setup: Callable[[torch.device], Any]
    contestants: tuple[Contestant[Any], ...]
    check: Callable[[Any], Check]
    baseline: str
    dtype: str = "float32"
    sizes: Mapping[str, int] = field(default_factory=dict)
    axis: str = ""
    effort: Effort = USUAL
    wanted: tuple[Wanted, ...] = ()
    is_quick: bool = False

    def measure(
        self,
        device: torch.device,
        without: Sequence[str] = (),
        on_step: Callable[[str], None] = lambda _: None,
        place: Place | None = None,
    ) -> list[Result]:
        """Everyone but those ``without`` whom it is to go; see :func:`measure`."""
        problem, place = self.setup(device), place or Together()
        with warnings.catch_warnings():
            # hooks and missing batching rules are warned about; what they cost is in the table
            warnings.simplefilter("ignore")
            return measure(
                problem,
                [contestant for contestant in self.contestants if contestant.name not in without],
                place.judge(partial(self.check, problem)),
                self.effort,
                baseline=self.baseline,
                cuda=device.type == "cuda",
                on_step=on_step,
                seat=place.seat,
            )


@dataclass(frozen=True)
class Question:
    """What a reader wants to know, and the cases that answer it.

    Args:
        asks: in one sentence.
        ours: the contestant whom the verdict is about.
    """

    name: str
    asks: str
    ours: str
    cases: tuple[Case, ...]


def by_key(questions: Iterable[Question]) -> dict[str, tuple[Question, Case]]:
    """Every case by ``question/case``, as the results file names it.

    Raises:
        ValueError: two cases have one name.
    """
    found: dict[str, tuple[Question, Case]] = {}
    for question in questions:
        for case in question.cases:
            key = f"{question.name}/{case.name}"
            if key in found:
                raise ValueError(f"run: names of cases must differ, got {key!r} twice.")
            found[key] = question, case
    return found


def targets(case: Case, results: Sequence[Result]) -> list[Target]:
    """What was wanted in this case."""
    by_name = {result.contestant: result for result in results}
    return [_target(wanted, by_name, case.sizes) for wanted in case.wanted]


def _target(wanted: Wanted, by_name: Mapping[str, Result], sizes: Mapping[str, int]) -> Target:
    ours = by_name[wanted.of]
    found, other = _found(wanted, ours, by_name, sizes)
    met = None
    if found is not None:
        met = found >= wanted.bound if wanted.is_least else found <= wanted.bound
    elif not ours.ok:
        met = False
    sign = "≥" if wanted.is_least else "≤"
    return Target(wanted.of, f"{wanted.kind} {other}", f"{sign} {wanted.bound:g}", found, met)


def _found(
    wanted: Wanted, ours: Result, by_name: Mapping[str, Result], sizes: Mapping[str, int]
) -> tuple[float | None, str]:
    """The figure, and whom it compares with."""
    if wanted.kind == "peak ÷":
        (other,) = wanted.others
        whole = sizes[ANSWER] if other == ANSWER else by_name[other].peak_bytes
        return (ours.peak_bytes / whole if ours.peak_bytes and whole else None), other
    times = {n: r.ratio.median for n in wanted.others if (r := by_name[n]).ok and r.ratio}
    best = min(times, key=times.__getitem__, default="")
    if not best or ours.ratio is None:
        return None, " | ".join(wanted.others)
    share = ours.ratio.median / times[best]
    return (1 / share if wanted.is_least else share), best


def as_record(question: Question, case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """A case as plain data, times by round included so that runs can be compared later."""
    return {
        "question": question.name,
        "asks": question.asks,
        "case": case.name,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "axis": case.axis,
        "baseline": case.baseline,
        "ours": question.ours,
        "targets": [asdict(target) for target in targets(case, results)],
        "results": [_shortened(asdict(result)) for result in results],
    }


def _shortened(record: dict[str, Any]) -> dict[str, Any]:
    """Four digits of a time are more than any machine repeats."""
    return record | {
        clock: {number: float(f"{took:.4g}") for number, took in record[clock].items()}
        for clock in ("seconds", "busy")
    }
