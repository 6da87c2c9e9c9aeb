"""Contestants measured: answers first, then the peak of an untimed call, then rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jacfunc._measuring.clock import Run, peak_bytes, seconds, shuffled, timed
from jacfunc._measuring.results import WARM_UP, Expected, Result, recording, summarize

Problem = TypeVar("Problem", contravariant=True)
Check = Callable[[Any], float]
"""Takes an answer, gives its largest relative error, or raises :class:`WrongAnswerError`."""

BRIEF = 0.05
"""Seconds of a call that may take longer, by a hundredth or by half, after others."""


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
    forecast: Callable[[Problem], Expected | None] | None = None
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

    def rounds_of(self, took: float) -> int:
        """Of a contestant whose call takes so many seconds."""
        calls = 2 if took < BRIEF else 1
        return max(self.fewest, min(self.rounds, int(self.seconds / (calls * took))))


class Entry:
    """A contestant that is being measured: prepared and checked, weighed, timed round by round.

    A step that fails leaves its reason in the result, and none follows it.
    """

    def __init__(
        self,
        problem: Any,
        contestant: Contestant[Any],
        check: Check,
        patience: float,
        cuda: bool,
        brief: float = BRIEF,
    ) -> None:
        self.result = Result(contestant.name, contestant.family)
        self._problem, self._contestant, self._check = problem, contestant, check
        self._patience, self._cuda, self._brief = patience, cuda, brief

    @property
    def name(self) -> str:
        return self.result.contestant

    def prepare(self) -> None:
        """Do what is done once, check an answer, and warm up where that is no long wait."""
        with recording(self.result):
            if self._contestant.work is not None:
                self.result.work = self._contestant.work(self._problem)
            if self._contestant.forecast is not None:
                self.result.forecast = self._contestant.forecast(self._problem)
            self._run = self._contestant.prepare(self._problem)
            took, answer = timed(self._run, self._cuda)
            if self._contestant.answers:
                self.result.error = self._check(answer)
            del answer
            if took < self._patience:
                took = seconds(self._run, self._cuda)
            self.result.seconds[WARM_UP] = took

    def weigh(self) -> None:
        """One untimed call for the peak."""
        with recording(self.result):
            if self._contestant.counted:
                self.result.peak_bytes = peak_bytes(self._run, self._cuda)

    def time(self, number: int) -> None:
        """The call of one round, after an untimed one where caches would be much of it."""
        with recording(self.result):
            if self.result.seconds[WARM_UP] < self._brief:
                self._run()
            began = time.process_time()
            self.result.seconds[number] = seconds(self._run, self._cuda)
            if not self._cuda:
                self.result.busy[number] = time.process_time() - began


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
    seat: Callable[[Entry], Entry] = lambda entry: entry,
) -> list[Result]:
    """Every contestant checked, weighed and timed.

    ``on_step`` is told whose turn it is, ``on_rounds`` how many calls the rounds will be, and
    ``seat`` says where an entry takes its steps.
    """
    entries = [seat(Entry(problem, c, check, effort.patience, cuda)) for c in contestants]
    for entry in entries:
        on_step(entry.name)
        entry.prepare()
    able = [entry for entry in entries if entry.result.ok]
    for entry in able:
        on_step(entry.name)
        entry.weigh()
    _time([entry for entry in able if entry.result.ok], effort, baseline, on_step, on_rounds)
    results = [entry.result for entry in entries]
    summarize({result.contestant: result for result in results}, baseline)
    return results


def _time(
    entries: Sequence[Entry],
    effort: Effort,
    baseline: str,
    on_step: Callable[[str], None],
    on_rounds: Callable[[int], None],
) -> None:
    """Rounds in shuffled order, each contestant at most once a round."""
    before = {entry.name: entry.result.seconds[WARM_UP] for entry in entries}
    wanted = {n: effort.rounds_of(took) for n, took in before.items() if took < effort.patience}
    total = max(wanted.values(), default=0)
    if baseline in wanted:
        # a ratio needs both times of one round
        wanted[baseline] = total
    on_rounds(sum(wanted.values()))
    racing = [entry for entry in entries if entry.name in wanted]
    for number, turns in enumerate(shuffled(racing, total)):
        for entry in turns:
            if entry.result.ok and takes_part(number, wanted[entry.name], total):
                on_step(entry.name)
                entry.time(number + 1)


def takes_part(number: int, wanted: int, rounds: int) -> bool:
    """Whether a contestant with ``wanted`` of all rounds, spread evenly, is in this one."""
    return (number + 1) * wanted // rounds > number * wanted // rounds
