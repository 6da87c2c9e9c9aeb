"""Times and memory: answers first, then interleaved rounds, then one untimed pass for the peak."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.contestants import BASELINE, Contestant, Run
from benchmarks.reference import WrongAnswerError, check
from benchmarks.workloads import Answer, Problem, Suite
from jacfunc._check import is_out_of_memory
from jacfunc._counting import PeakBytes
from jacfunc._machine import seconds_of

FEWEST_ROUNDS = 5
Name = TypeVar("Name")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Result:
    """What became of one contestant on one workload; a failure stays, with its reason."""

    contestant: str
    family: str
    status: str = "ok"
    error: float | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    """By round: a slow contestant sits some rounds out."""
    time: Spread | None = None
    ratio: Spread | None = None
    peak_bytes: int | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def measure(
    problem: Problem,
    contestants: Sequence[Contestant],
    expected: Answer,
    suite: Suite,
    on_step: Callable[[], None] = lambda: None,
    *,
    baseline: str = BASELINE,
    fewest: int = FEWEST_ROUNDS,
) -> list[Result]:
    """Every contestant checked, timed and weighed; ``on_step`` is called 2 + rounds times."""
    results = [Result(contestant.name, contestant.family) for contestant in contestants]
    runs: dict[str, Run] = {}
    for contestant, result in zip(contestants, results, strict=True):
        with recording(result):
            runs[result.contestant] = contestant.prepare(problem)
            answer = runs[result.contestant]()
            result.error = check(answer, expected) if contestant.answers else None
            del answer
    on_step()
    running = {r.contestant: (r, runs[r.contestant]) for r in results if r.ok}
    _time_rounds(running, problem, suite, on_step, baseline, fewest)
    for result, run in ((result, run) for result, run in running.values() if result.ok):
        with recording(result):
            result.peak_bytes = peak_bytes(run, problem.cuda())
    on_step()
    summarize({result.contestant: result for result in results}, baseline)
    return results


def _time_rounds(
    running: Mapping[str, tuple[Result, Run]],
    problem: Problem,
    suite: Suite,
    on_step: Callable[[], None],
    baseline: str,
    fewest: int,
) -> None:
    """Rounds in shuffled order, each contestant at most once a round."""
    cuda = problem.cuda()
    wanted = {}
    for name, (result, run) in running.items():
        with recording(result):
            # the check was the first warm-up; this one tells how many rounds fit
            fit = suite.seconds / seconds(run, cuda)
            wanted[name] = max(fewest, min(suite.rounds, int(fit)))
    if baseline in wanted:
        # a ratio needs both times of one round
        wanted[baseline] = suite.rounds
    # as in interleaved(), but a slow contestant sits some rounds out, and may fail in any
    order = random.Random(0)
    for number in range(suite.rounds):
        for name in order.sample(list(wanted), len(wanted)):
            result, run = running[name]
            if result.ok and takes_part(number, wanted[name], suite.rounds):
                with recording(result):
                    result.seconds[number] = seconds(run, cuda)
        on_step()


def takes_part(number: int, wanted: int, rounds: int) -> bool:
    """Whether a contestant with ``wanted`` of all rounds, spread evenly, is in this one."""
    return (number + 1) * wanted // rounds > number * wanted // rounds


def seconds(run: Callable[[], Any], cuda: bool) -> float:
    """Wall time of one call; the answer is freed after the clock has stopped."""
    with uncollected():
        return seconds_of(run, torch.device("cuda" if cuda else "cpu"))


def interleaved(
    runs: Mapping[Name, Callable[[], Any]], rounds: int, cuda: bool
) -> dict[Name, list[float]]:
    """Seconds of every run in every round; the rounds go in shuffled order.

    Rotating would leave everyone behind the same neighbour, and what a neighbour leaves in the
    caches moved a ratio by a tenth.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], cuda))
    return times


def peak_bytes(run: Callable[[], Any], cuda: bool) -> int:
    """Most bytes that one call holds at once, its answer included, above what was held before."""
    if not cuda:
        counter = PeakBytes()
        with counter:
            run()
        return counter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def summarize(results: Mapping[str, Result], baseline: str) -> None:
    """Fill in medians, and ratios to the baseline taken round by round."""
    base = results[baseline].seconds if baseline in results else {}
    for result in results.values():
        if not result.ok or not result.seconds:
            continue
        result.time = Spread.of(list(result.seconds.values()))
        ratios = [took / base[n] for n, took in result.seconds.items() if n in base]
        result.ratio = Spread.of(ratios) if ratios else None


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: it would be charged to whoever runs at the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def recording(result: Result) -> Iterator[None]:
    """Turn a failure into the result's status."""
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
