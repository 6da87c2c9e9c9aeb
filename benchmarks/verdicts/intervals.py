"""What a case record says: intervals of ratios, ties, who wins, and how time grows."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from benchmarks.running.records import Record
from jacfunc._measuring import counted

Verdict = Literal["faster", "slower", "tie"]

TIE = 0.05  # ratios as near to 1 as this are no difference
RESAMPLES = 2000
# the 97.5 % point of Student's t, by the number of rounds: a bootstrap of so few never leaves their
# range, which holds the median of two in 50 % of cases
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182}

BOUND, JAX = "bound", "JAX"
"""Families that do not win: what only bounds the time, and what would take another framework."""


@dataclass(frozen=True)
class Interval:
    """A middle, and where it lies in 95 of 100 repetitions."""

    low: float
    mid: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def beside(record: Record, name: str, other: str) -> Interval | None:
    """Time of one contestant ÷ that of another, or None where one of them has none.
    The middle is the median over the rounds in which both took part, each round one ratio; where
    they share no round, it is the ratio of their medians.
    """
    for with_warm_up in (False, True):  # one of them may have the warm-up alone
        first, second = (rounds_of(record, n, with_warm_up) for n in (name, other))
        if common := sorted(first.keys() & second.keys()):
            return median_interval([first[number] / second[number] for number in common])
    above, below = alone(record, name), alone(record, other)
    return divided(above, below) if above and below else None


def alone(record: Record, name: str) -> Interval | None:
    """Seconds of a contestant, or None where it has none."""
    rounds = rounds_of(record, name)
    return median_interval([*rounds.values()]) if rounds else None


def find(record: Record, name: str) -> Record | None:
    """The result of a contestant in a case."""
    return next((r for r in record["results"] if r["contestant"] == name), None)


def rounds_of(record: Record, name: str, with_warm_up: bool = False) -> Mapping[int, float]:
    """Seconds by round, without the warm-up unless there is nothing else; none of who failed."""
    result = find(record, name)
    if result is None or result["status"] != "ok":
        return {}
    seconds = {int(number): took for number, took in result["seconds"].items()}
    return seconds if with_warm_up else counted(seconds)


def median_interval(values: Sequence[float]) -> Interval:
    """95 % for the median, by bootstrap; of fewer than five values by Student's t of logarithms."""
    middle, count = statistics.median(values), len(values)
    if count == 1:
        return Interval(middle, middle, middle)
    if count in STUDENT:
        logarithms = [math.log(value) for value in values]
        width = STUDENT[count] * statistics.stdev(logarithms) / math.sqrt(count)
        centre = statistics.fmean(logarithms)
        low, high = math.exp(centre - width), math.exp(centre + width)
    else:
        ordered = torch.tensor(sorted(values), dtype=torch.float64)
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = ordered[_middles(count)].mean(0).quantile(ends).tolist()
    return Interval(min(low, middle), middle, max(high, middle))


@cache
def _middles(count: int) -> Tensor:
    """Where the two middle ones of each resample stand among the sorted values.
    They depend on the number of rounds alone, so that a report says the same every time.
    """
    generator = torch.Generator().manual_seed(0)
    resamples = torch.randint(count, (RESAMPLES, count), generator=generator).sort(1).values
    return resamples[:, [(count - 1) // 2, count // 2]].T


def divided(above: Interval, below: Interval) -> Interval:
    """The quotient of two independent intervals: errors add up as squares of logarithms."""
    middle = above.mid / below.mid
    down = math.hypot(math.log(above.mid / above.low), math.log(below.high / below.mid))
    up = math.hypot(math.log(above.high / above.mid), math.log(below.mid / below.low))
    return Interval(middle * math.exp(-down), middle, middle * math.exp(up))


def verdict(interval: Interval) -> Verdict:
    """A tie is what lies within 5 % of 1, or cannot be told from 1."""
    near = max(interval.mid, 1 / interval.mid) <= 1 + TIE
    if near or interval.contains(1.0):
        return "tie"
    return "faster" if interval.mid < 1 else "slower"


def winners(record: Record) -> list[str]:
    """The fastest in PyTorch with a right answer, then whoever ties with it, by their times."""
    timed = (name for name in _rivals_in_torch(record) if rounds_of(record, name))
    times = {name: time_of(record, name) for name in timed}
    names = sorted(times, key=times.__getitem__)
    ratios = [beside(record, name, names[0]) for name in names[1:]]
    pairs = zip(names[1:], ratios, strict=True)
    return [*names[:1], *(n for n, ratio in pairs if ratio and verdict(ratio) == "tie")]


def time_of(record: Record, name: str) -> float:
    """Time in units of the baseline where it has one, which takes out what moved between rounds."""
    ratio = beside(record, name, record["baseline"])
    return ratio.mid if ratio else statistics.median(rounds_of(record, name).values())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power law nearest to the values, by least squares on log axes."""
    logarithms = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(*logarithms).slope


def exponent(records: Iterable[Record], name: str, axis: str) -> float | None:
    """How a contestant's time grows along an axis, from three sizes on."""
    points = [
        (record["sizes"][axis], statistics.median(rounds.values()))
        for record in records
        if record["axis"] == axis and (rounds := rounds_of(record, name))
    ]
    if len({size for size, _ in points}) < 3:
        return None
    return slope(*zip(*points, strict=True))


def against(record: Record) -> str | None:
    """Whom ``ours`` is held against: the baseline, or where that is ours, the fastest other."""
    if record["baseline"] != record["ours"]:
        return str(record["baseline"])
    others = {n for n, family in _rivals_in_torch(record).items() if family != "jacfunc"}
    timed = [name for name in others if rounds_of(record, name)]
    return min(timed, key=lambda name: (time_of(record, name), name), default=None)


def ratios(records: Iterable[Record]) -> tuple[str, list[float]]:
    """Whom ours is held against, in a word, and ours beside them in each case with both times."""
    names, times, several = set[str](), list[float](), "the fastest other"
    for record in records:
        other = against(record)
        if other and (interval := beside(record, record["ours"], other)):
            names.add(other)
            times.append(interval.mid)
            several = several if record["baseline"] == record["ours"] else "the baseline"
    return names.pop() if len(names) == 1 else several, times


def is_contested(record: Record) -> bool:
    """Whether anyone else took part, be it in vain."""
    return len(_rivals_in_torch(record)) > 1


def _rivals_in_torch(record: Record) -> dict[str, str]:
    """The family of whoever could win."""
    families = {r["contestant"]: r["family"] for r in record["results"]}
    return {name: family for name, family in families.items() if family not in (BOUND, JAX)}


def number(ratio: float) -> str:
    """Two decimals, or two digits where they would say little."""
    if ratio < 0.1:
        return f"{float(f'{ratio:.2g}')}"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def span(values: Sequence[float]) -> str:
    """The least and the largest ratio."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}–{high}"
