"""Contestants measured: answers are judged first, then a call is weighed, then all are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from jacfunc._measuring.clock import Run, peak_bytes, seconds_of, shuffled
from jacfunc._measuring.results import WARM_UP, Result, failures_in, summarize

ProblemT = TypeVar("ProblemT", contravariant=True)
Check = Callable[[Any], float]
"""Takes an answer, gives its largest relative error, or raises :class:`WrongAnswerError`."""

BRIEF = 0.05
"""Calls of fewer seconds are slower after another's call, by a hundredth or by half."""

SETTLING_CALLS = 32
"""At most so many calls come before those that are timed: a way that learns from its calls, as a
compiler does and as jacfunc does, is timed when it has learnt."""


@dataclass(frozen=True)
class Contestant(Generic[ProblemT]):
    """One way to the answer: ``prepare`` does what a user does once, and gives the call to measure.

    Args:
        family: the library that it belongs to.
        answers: False for what only bounds the time, such as a bare write.
        counted: False where memory is not torch's, so that it cannot be counted.
        forecast: seconds and peak bytes that jacfunc expects; None for what it cannot say.
        work: floating-point operations that theory counts.
    """

    name: str
    family: str
    prepare: Callable[[ProblemT], Run]
    answers: bool = True
    counted: bool = True
    forecast: Callable[[ProblemT], tuple[float | None, int | None]] | None = None
    work: Callable[[ProblemT], float] | None = None


@dataclass(frozen=True)
class Effort:
    """How long contestants are measured.

    Args:
        rounds, fewest: rounds at most and at least.
        seconds: the time for the rounds of each contestant.
        patience: a call that takes so many seconds is not made again.
        settling: calls come before those that are timed for about so many seconds.
    """

    rounds: int = 40
    seconds: float = 1.5
    fewest: int = 5
    patience: float = 20.0
    settling: float = SETTLING_CALLS * BRIEF  # enough for all that settle

    def rounds_of(self, took: float) -> int:
        """The number of rounds of a contestant whose call takes so many seconds."""
        calls = 2 if took < BRIEF else 1
        return max(self.fewest, min(self.rounds, int(self.seconds / (calls * took))))


class Entry:
    """A contestant that is being measured: prepared and checked, weighed, timed round by round.

    A step that fails leaves its reason in the result, and no other step follows it.
    """

    def __init__(
        self,
        problem: Any,
        contestant: Contestant[Any],
        check: Check,
        effort: Effort,
        device: torch.device,
    ) -> None:
        self.result = Result(contestant.name, contestant.family)
        self._problem, self._contestant, self._check = problem, contestant, check
        self._effort, self._device = effort, device

    @property
    def name(self) -> str:
        return self.result.contestant

    def prepare(self) -> None:
        """Do what is done once, and warm up unless that is a long wait; check what comes first and
        what comes last, since a way that has learnt may answer otherwise than before.
        """
        result, contestant = self.result, self._contestant
        with failures_in(result):
            if contestant.work is not None:
                result.work = contestant.work(self._problem)
            if contestant.forecast is not None:
                result.forecast_seconds, result.forecast_bytes = contestant.forecast(self._problem)
            self._run = contestant.prepare(self._problem)
            took = self._judged()
            if took < self._effort.patience:
                took = seconds_of(self._run, self._device)
            calls = int(self._effort.settling / took) if took < BRIEF else 0
            for _ in range(min(SETTLING_CALLS, calls)):
                self._run()
            result.seconds[WARM_UP] = self._judged() if calls else took

    def _judged(self) -> float:
        """Seconds of a call whose answer is checked; the largest error stays."""
        answers: list[Any] = []
        took = seconds_of(lambda: answers.append(self._run()), self._device)
        if self._contestant.answers:
            self.result.error = max(self._check(answers[0]), self.result.error or 0.0)
        return took

    def weigh(self) -> None:
        """Count the peak of one untimed call."""
        with failures_in(self.result):
            if self._contestant.counted:
                self.result.peak_bytes = peak_bytes(self._run, self._device)

    def time(self, number: int) -> None:
        """Time the call of one round, after an untimed call where caches would be much of it."""
        with failures_in(self.result):
            if self.result.seconds[WARM_UP] < BRIEF:
                self._run()
            began = time.process_time()
            self.result.seconds[number] = seconds_of(self._run, self._device)
            if self._device.type != "cuda":
                self.result.busy[number] = time.process_time() - began


def measure(
    entries: Sequence[Entry],
    effort: Effort,
    baseline: str,
    on_step: Callable[[str, int], None] = lambda name, total: None,
) -> list[Result]:
    """Results of all entries, in their order, with ratios to the baseline.

    An entry whose result has failed takes no step. ``on_step`` is called before each step, with the
    name of the entry and the number of all steps.
    """
    total = (2 + effort.rounds) * len(entries)
    for entry in entries:
        if entry.result.ok:
            on_step(entry.name, total)
            entry.prepare()
    for entry in entries:
        if entry.result.ok:
            on_step(entry.name, total)
            entry.weigh()
    before = {entry.name: entry.result.seconds[WARM_UP] for entry in entries if entry.result.ok}
    shares = {n: effort.rounds_of(took) for n, took in before.items() if took < effort.patience}
    rounds = max(shares.values(), default=0)
    if baseline in shares:
        # a ratio needs both times of one round
        shares[baseline] = rounds
    total = 2 * len(entries) + sum(shares.values())
    racing = [entry for entry in entries if entry.name in shares]
    for number, turns in enumerate(shuffled(racing, rounds), 1):
        for entry in turns:
            if entry.result.ok and _takes_part(number, shares[entry.name], rounds):
                on_step(entry.name, total)
                entry.time(number)
    results = [entry.result for entry in entries]
    summarize({result.contestant: result for result in results}, baseline)
    return results


def _takes_part(number: int, share: int, rounds: int) -> bool:
    """Whether a contestant with a share of all rounds, spread evenly, takes part in this one."""
    return number * share // rounds > (number - 1) * share // rounds
