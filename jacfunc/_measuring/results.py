"""What becomes of a contestant: its error, times and bytes, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from jacfunc._errors import is_out_of_memory

WARM_UP = 0
"""The number of the warm-up among the rounds; it counts only where there is no other round."""


class WrongAnswerError(Exception):
    """An answer has other blocks, shapes or numbers than the reference."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a quantity."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        times = torch.tensor(values, dtype=torch.float64)
        low, median, high = times.quantile(times.new_tensor([0.25, 0.5, 0.75])).tolist()
        return cls(median, low, high)


def spread_of(value: Spread, scale: float = 1) -> str:
    """Text for a table: ``median (low–high)``, the quartiles in brackets."""
    median, low, high = (_short(x * scale) for x in (value.median, value.low, value.high))
    return f"{median} ({low}–{high})"


def _short(value: float) -> str:
    """Three digits, or two after the point if these are fewer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass
class Result:
    """What became of one contestant on one problem; a failure stays, with its reason.

    Args:
        status: ``"ok"``, or the reason of the failure.
        error: the largest relative error of its answer.
        seconds: by round, from 1 on; a slow contestant sits rounds out, or has the warm-up alone.
        busy: seconds of the processor by round, without what other processes took.
        time, ratio: the spread of seconds, and of those divided by the baseline's.
        forecast_seconds, forecast_bytes: time and peak that jacfunc expected.
        work: floating-point operations that theory counts.
    """

    contestant: str
    family: str
    status: str = "ok"
    error: float | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    busy: dict[int, float] = field(default_factory=dict)
    time: Spread | None = None
    ratio: Spread | None = None
    peak_bytes: int | None = None
    forecast_seconds: float | None = None
    forecast_bytes: int | None = None
    work: float | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def summarize(results: Mapping[str, Result], baseline: str) -> None:
    """Fill in the spread of times, and of their ratios to the baseline, taken round by round."""
    base = results[baseline].seconds if baseline in results else {}
    for result in results.values():
        if not result.ok or not result.seconds:
            continue
        result.time = Spread.of(list(counted(result.seconds).values()))
        ratios = {n: took / base[n] for n, took in result.seconds.items() if n in base}
        result.ratio = Spread.of(list(counted(ratios).values())) if ratios else None


def counted(rounds: Mapping[int, float]) -> Mapping[int, float]:
    """The rounds that count: all but the warm-up, unless there is no other."""
    return {number: value for number, value in rounds.items() if number != WARM_UP} or rounds


def pooled(runs: Sequence[Sequence[Result]], baseline: str) -> list[Result]:
    """Results of contestants that were measured several times: their rounds, put in one row."""
    first, *others = runs
    for again in others:
        last = max((n for result in first for n in result.seconds), default=WARM_UP)
        for result, more in zip(first, again, strict=True):
            result.status = result.status if more.ok else more.status
            for clock, added in ((result.seconds, more.seconds), (result.busy, more.busy)):
                clock.update({last + n: took for n, took in added.items() if n != WARM_UP})
    summarize({result.contestant: result for result in first}, baseline)
    return list(first)


@contextmanager
def failures_in(result: Result) -> Iterator[None]:
    """Turn a failure inside into the status of the result."""
    try:
        yield
    except WrongAnswerError as wrong:
        result.status = f"wrong: {wrong}"
    except ModuleNotFoundError as missing:
        result.status = f"not installed: {missing}"
    except Exception as error:
        # the table must be finished, whatever one contestant does
        result.status = _failure(error)


def _failure(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    line = next(iter(str(error).strip().splitlines()), "")
    return f"unsupported: {type(error).__name__}: {line}"[:200]
