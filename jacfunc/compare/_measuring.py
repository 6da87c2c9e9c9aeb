"""Contestants measured: answers first, then the peak of an untimed call, then rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jacfunc.compare._clock import Run, peak_bytes, seconds, timed
from jacfunc.compare._results import WARM_UP, Forecast, Result, recording, summarize

Problem = TypeVar("Problem", contravariant=True)
Check = Callable[[Any], float]
"""Takes an answer, gives its largest relative error, or raises :class:`WrongAnswerError`."""


@dataclass(frozen=True)
class Contestant(Generic[Problem]):
    """One way to the answer: ``prepare`` does once what a user would do once.

    Args:
        answers: False for what only bounds the time, such as a bare write.
        counted: False where memory is not torch's, and cannot be counted.
        forecast: what jacfunc says beforehand.
        work: floating-point operations that theory counts.
    """

    name: str
    family: str
    prepare: Callable[[Problem], Run]
    answers: bool = True
    counted: bool = True
    forecast: Callable[[Problem], Forecast | None] | None = None
    work: Callable[[Problem], float] | None = None


@dataclass(frozen=True)
class Effort:
    """How long: rounds at most and at least, seconds a contestant.

    Args:
        patience: seconds of a call from which on it is not made again.
    """

    rounds: int = 40
    seconds: float = 1.5
    fewest: int = 5
    patience: float = 20.0


@dataclass
class Entry:
    """A contestant that is being measured."""

    result: Result
    counted: bool
    run: Run
    warm_up: float
    """Seconds of its last call before the rounds."""


def measure(
    problem: Any,
    contestants: Sequence[Contestant[Any]],
    check: Check,
    effort: Effort,
    *,
    baseline: str,
    cuda: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
    on_rounds: Callable[[int], None] = lambda _: None,
) -> list[Result]:
    """Every contestant checked, weighed and timed.

    ``on_step`` is told whose turn it is, ``on_rounds`` how many calls the rounds will be.
    """
    results = [Result(contestant.name, contestant.family) for contestant in contestants]
    entries: dict[str, Entry] = {}
    for contestant, result in zip(contestants, results, strict=True):
        on_step(contestant.name)
        with recording(result):
            entries[contestant.name] = _prepared(problem, contestant, result, check, effort, cuda)
    for name, entry in entries.items():
        if entry.counted:
            on_step(name)
            with recording(entry.result):
                entry.result.peak_bytes = peak_bytes(entry.run, cuda)
    _time(entries, effort, baseline, cuda, on_step, on_rounds)
    summarize({result.contestant: result for result in results}, baseline)
    return results


def _prepared(
    problem: Any,
    contestant: Contestant[Any],
    result: Result,
    check: Check,
    effort: Effort,
    cuda: bool,
) -> Entry:
    if contestant.work is not None:
        result.work = contestant.work(problem)
    if contestant.forecast is not None:
        result.forecast = contestant.forecast(problem)
    run = contestant.prepare(problem)
    took, answer = timed(run, cuda)
    if contestant.answers:
        result.error = check(answer)
    del answer
    if took < effort.patience:
        took = seconds(run, cuda)
    return Entry(result, contestant.counted, run, took)


def _time(
    entries: Mapping[str, Entry],
    effort: Effort,
    baseline: str,
    cuda: bool,
    on_step: Callable[[str], None],
    on_rounds: Callable[[int], None],
) -> None:
    """Rounds in shuffled order, each contestant at most once a round."""
    wanted = {}
    for name, entry in entries.items():
        if entry.warm_up >= effort.patience or name == baseline:
            # whoever has no other round is compared with the baseline in this one
            entry.result.seconds[WARM_UP] = entry.warm_up
        if entry.warm_up < effort.patience:
            fit = int(effort.seconds / entry.warm_up)
            wanted[name] = max(effort.fewest, min(effort.rounds, fit))
    total = max(wanted.values(), default=0)
    if baseline in wanted:
        # a ratio needs both times of one round
        wanted[baseline] = total
    on_rounds(sum(wanted.values()))
    order = random.Random(0)
    for number in range(total):
        for name in order.sample(list(wanted), len(wanted)):
            entry = entries[name]
            if entry.result.ok and takes_part(number, wanted[name], total):
                on_step(name)
                with recording(entry.result):
                    began = time.process_time()
                    entry.result.seconds[number + 1] = seconds(entry.run, cuda)
                    if not cuda:
                        entry.result.busy[number + 1] = time.process_time() - began


def takes_part(number: int, wanted: int, rounds: int) -> bool:
    """Whether a contestant with ``wanted`` of all rounds, spread evenly, is in this one."""
    return (number + 1) * wanted // rounds > number * wanted // rounds
