"""One run of the suite against another: what became slower, what did not, what cannot be told.

Times are the processor's where both runs have them, without what other processes took; on CUDA they
are the clock's. They are ratios to the baseline of their own run, so that a slower machine cancels;
a change is the quotient of two medians. Beyond a tenth, and surely not at 1, it is one; within it,
and surely short of the fifth that must be found, it is none. All else is inconclusive: more rounds,
or less load on the machine, would tell.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.running.records import Record, Run
from benchmarks.verdicts.intervals import Interval, alone, beside, divided, rounds_of

MARGIN = 0.10  # a smaller change is none
# a change of this size is not to be missed: it must be excluded before two are called the same
SOUGHT = 0.20
CONDITIONS = ("device_name", "cpus", "system", "torch", "threads")

Verdict = Literal[
    "regressed", "improved", "equivalent", "inconclusive", "broke", "mended", "fails", "baseline"
]


@dataclass(frozen=True)
class Change:
    """How one contestant differs in one case between two runs."""

    case: str
    contestant: str
    verdict: Verdict
    interval: Interval | None  # time beside the baseline, second ÷ first run; its own, of seconds
    statuses: tuple[str, str]  # in both runs


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; ``only_first`` and ``only_second`` name what the other lacks."""

    changes: tuple[Change, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    warning: str

    @property
    def regressed(self) -> tuple[Change, ...]:
        """Changes of contestants that became slower, or no longer answer."""
        return tuple(c for c in self.changes if c.verdict in ("regressed", "broke"))

    @property
    def counts(self) -> Counter[str]:
        """How many changes there are, by verdict."""
        return Counter(change.verdict for change in self.changes)


def compare(a: Run, b: Run) -> Comparison:
    """Every contestant of every case that is in both runs."""
    changes = tuple(
        _change(key, before, after, name)
        for key, before in a.cases.items()
        if (after := b.cases.get(key))
        for name in _present(before)
        if name in _present(after)
    )
    pairs = [(name, a.environment.get(name), b.environment.get(name)) for name in CONDITIONS]
    differing = [f"{name} {one} and {other}" for name, one, other in pairs if one != other]
    warning = f"Not made alike: {'; '.join(differing)}." if differing else ""
    return Comparison(changes, tuple(_lacking(a, b)), tuple(_lacking(b, a)), warning)


def judge(change: Interval) -> Verdict:
    """The verdict on a change, by where its middle is and what its interval excludes."""
    size = abs(math.log(change.mid))
    if size > math.log(1 + MARGIN):
        if change.contains(1.0):
            return "inconclusive"
        return "regressed" if change.mid > 1 else "improved"
    is_sure = change.low > 1 / (1 + SOUGHT) and change.high < 1 + SOUGHT
    return "equivalent" if is_sure else "inconclusive"


def _change(key: str, a: Record, b: Record, name: str) -> Change:
    statuses = _present(a)[name], _present(b)[name]
    if all(r.get("busy") for record in (a, b) for r in record["results"] if r["status"] == "ok"):
        a, b = _by_processor(a), _by_processor(b)
    if "ok" not in statuses:
        return Change(key, name, "fails", None, statuses)
    if statuses != ("ok", "ok"):
        return Change(key, name, "broke" if statuses[0] == "ok" else "mended", None, statuses)
    is_yardstick = name == (yardstick := _yardstick(a, b))
    after, before = (alone(r, name) if is_yardstick else beside(r, name, yardstick) for r in (b, a))
    interval = divided(after, before) if after and before else None
    verdict = judge(interval) if interval else "inconclusive"
    return Change(key, name, "baseline" if is_yardstick else verdict, interval, statuses)


def _yardstick(a: Record, b: Record) -> str:
    """Whose time is 1: the baseline, unless that is jacfunc, which is what may have changed."""
    rounds = {
        result["contestant"]: len(rounds_of(a, result["contestant"]))
        for result in a["results"]
        if result["family"] != "jacfunc" and result["status"] == "ok"
        if _present(b).get(result["contestant"]) == "ok"
    }
    baseline: str = a["baseline"]
    return baseline if baseline in rounds else max(rounds, key=rounds.__getitem__, default=baseline)


def _present(record: Record) -> dict[str, str]:
    """The status of every contestant; a library that is not installed does not take part."""
    statuses = {result["contestant"]: result["status"] for result in record["results"]}
    return {n: status for n, status in statuses.items() if not status.startswith("not installed")}


def _by_processor(record: Record) -> Record:
    results = [result | {"seconds": result.get("busy", {})} for result in record["results"]]
    return record | {"results": results}


def _lacking(run: Run, other: Run) -> Iterator[str]:
    """What the first run has alone: whole cases, and contestants of those that both have."""
    for key, record in run.cases.items():
        if key not in other.cases:
            yield key
            continue
        present = _present(other.cases[key])
        yield from (f"{key}: {name}" for name in _present(record) if name not in present)
