"""A question, its cases, and what is wanted in each: the rows of the benchmark."""

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self

import torch

from benchmarks.running.processes import Together
from jacfunc._measuring import Check, Contestant, Effort, Entry, Result, measure

ANSWER = "bytes of the answer"  # the size that peaks are compared with where no contestant is named
USUAL, MANY_SHORT = Effort(), Effort(rounds=60, seconds=0.6, fewest=3, patience=15.0)
BEST: Literal["time ÷ best"] = "time ÷ best"  # who is compared so belongs to the suite by hand
Results = Mapping[str, Result]  # by contestant


@dataclass(frozen=True)
class Wanted:
    """A bound on the time of one contestant beside the fastest of others, or on its peak."""

    of: str
    kind: Literal["times faster than", "time ÷", "time ÷ best", "peak ÷"]
    bound: float
    others: tuple[str, ...]  # of a peak, the one whose peak it is divided by, or ANSWER


def best(of: str, batch: int, *others: str) -> Wanted:
    """What is wanted beside the best that one can write by hand, at a batch size."""
    return Wanted(of, BEST, 1.25 if batch > 1 else 1.6, others)


@dataclass(frozen=True)
class Case:
    """One problem at one size, and who takes part."""

    name: str
    setup: Callable[[torch.device], Any]  # the problem, with the same numbers every time
    contestants: tuple[Contestant[Any], ...]
    check: Callable[[Any], Check]  # from the problem, what judges an answer
    baseline: str  # the contestant whose time is 1
    dtype: str = "float32"
    sizes: Mapping[str, int] = field(default_factory=dict)  # such as inputs, batch or ANSWER
    axis: str = ""  # the size that grows from case to case, where exponents are fitted
    effort: Effort = USUAL
    wanted: tuple[Wanted, ...] = ()
    is_quick: bool = False
    threads: int = 1

    @property
    def by_hand(self) -> Self | None:
        """The case with those alone who are beside the best of others, if there are any."""
        wanted = tuple(wanted for wanted in self.wanted if wanted.kind == BEST)
        names = {self.baseline, *(n for w in wanted for n in (w.of, *w.others))}
        some = tuple(c for c in self.contestants if c.name in names)
        return replace(self, wanted=wanted, contestants=some, effort=MANY_SHORT) if wanted else None

    def measure(
        self,
        device: torch.device,
        without: Sequence[str] = (),
        on_step: Callable[[str, int], None] = lambda name, total: None,
        place: Together | None = None,
    ) -> list[Result]:
        """Results of everyone but those ``without`` whom it is to go."""
        torch.set_num_threads(self.threads)
        problem, place = self.setup(device), place or Together()
        with warnings.catch_warnings():
            # hooks and missing batching rules are warned about; what they cost is in the table
            warnings.simplefilter("ignore")
            check = place.judge(partial(self.check, problem))
            entries = [
                place.seat(Entry(problem, contestant, check, self.effort, device))
                for contestant in self.contestants
                if contestant.name not in without
            ]
            return measure(entries, self.effort, self.baseline, on_step)


@dataclass(frozen=True)
class Question:
    """What a reader wants to know, and the cases that answer it."""

    name: str
    asks: str  # in one sentence
    ours: str  # the contestant whom the verdict is about
    cases: tuple[Case, ...]


def by_key(questions: Iterable[Question]) -> dict[str, tuple[Question, Case]]:
    """Every case by ``question/case``, as the results file names it; names must differ."""
    cases: dict[str, tuple[Question, Case]] = {}
    for question in questions:
        for case in question.cases:
            key = f"{question.name}/{case.name}"
            if key in cases:
                raise ValueError(f"run: names of cases must differ, got {key!r} twice.")
            cases[key] = question, case
    return cases


def as_record(question: Question, case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """A case as plain data, times by round included so that runs can be compared later."""
    by_name = {result.contestant: result for result in results}
    return {
        "question": question.name,
        "asks": question.asks,
        "case": case.name,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "axis": case.axis,
        "baseline": case.baseline,
        "ours": question.ours,
        "targets": [_target(wanted, by_name, case) for wanted in case.wanted],
        "results": [_plain(asdict(result)) for result in results],
    }


def _target(wanted: Wanted, results: Results, case: Case) -> dict[str, Any]:
    """What was wanted of whom, and what came out; None where that cannot be said here."""
    ours, is_least = results[wanted.of], wanted.kind == "times faster than"
    value, other = _value(wanted, results, case)
    met = None if ours.ok else False
    if value is not None:
        met = value >= wanted.bound if is_least else value <= wanted.bound
    bound = f"{'≥' if is_least else '≤'} {wanted.bound:g}"
    what = f"{wanted.kind} {other}"
    return {"of": wanted.of, "what": what, "wanted": bound, "found": value, "met": met}


def _value(wanted: Wanted, results: Results, case: Case) -> tuple[float | None, str]:
    """The ratio that a bound is on, and whom it compares with."""
    ours = results[wanted.of]
    if wanted.kind == "peak ÷":
        (other,) = wanted.others
        whole = case.sizes[ANSWER] if other == ANSWER else results[other].peak_bytes
        return (ours.peak_bytes / whole if ours.peak_bytes and whole else None), other
    of_processor = wanted.kind == BEST and case.threads == 1
    times = {n: t for n in wanted.others if (t := _time(results[n], of_processor))}
    best, own = min(times, key=times.__getitem__, default=""), _time(ours, of_processor)
    if not best or own is None:
        return None, " | ".join(wanted.others)
    share = own / times[best]
    return (1 / share if wanted.kind == "times faster than" else share), best


def _time(result: Result, of_processor: bool) -> float | None:
    """Seconds of the processor, which no other process adds to; or beside the baseline's."""
    if of_processor and result.ok and result.busy:
        return statistics.median(result.busy.values())
    return result.ratio.median if result.ok and result.ratio else None


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """A result with four digits of each time: more is not repeated by any machine."""
    seconds, peak_bytes = result.pop("forecast_seconds"), result.pop("forecast_bytes")
    is_said = seconds is not None or peak_bytes is not None
    result["forecast"] = {"seconds": seconds, "peak_bytes": peak_bytes} if is_said else None
    for clock in ("seconds", "busy"):
        result[clock] = {number: float(f"{took:.4g}") for number, took in result[clock].items()}
    return result
