"""Rounds: who has a turn when, and what becomes of whoever fails. No time is asserted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from jacfunc._measuring import Contestant, Effort, Entry, interleaved, measure, shuffled
from jacfunc._measuring.results import WARM_UP, Result, WrongAnswerError
from jacfunc._measuring.rounds import BRIEF, SETTLING_CALLS

CPU = torch.device("cpu")


def test_each_call_has_one_turn_a_round_in_an_order_that_changes() -> None:
    rounds = list(shuffled("abcd", 20))
    assert all(sorted(turns) == list("abcd") for turns in rounds)
    assert len(set(map(tuple, rounds))) > 5
    assert rounds == list(shuffled("abcd", 20))


def test_a_call_that_is_removed_has_no_more_turns() -> None:
    calls = list("abc")
    turns = Counter()
    for number, names in enumerate(shuffled(calls, 10)):
        turns.update(names)
        if number == 3:
            calls.remove("b")
    assert turns == {"a": 10, "b": 4, "c": 10}


def test_every_run_has_a_time_in_every_round() -> None:
    made: list[str] = []
    runs = {name: (lambda name=name: made.append(name)) for name in "ab"}
    seconds = interleaved(runs, 7, CPU)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 7, "b": 7}
    assert Counter(made) == {"a": 7, "b": 7}


def judged(answer: Any) -> float:
    if answer != 1:
        raise WrongAnswerError("not 1")
    return 0.0


def entry(name: str, run: Callable[[], Any]) -> Entry:
    return Entry(None, Contestant(name, "rival", lambda _: run), judged, Effort(), CPU)


def crashing() -> Any:
    raise KeyError("a rule")


BEFORE_ROUNDS = 2 + SETTLING_CALLS + 1  # the first, the warm-up, those that settle, the last


def failing_later() -> Callable[[], Any]:
    calls = iter([1] * (BEFORE_ROUNDS + 1))  # one more is weighed
    return lambda: next(calls)


def test_whoever_fails_takes_no_further_step() -> None:
    entries = [
        entry("base", lambda: 1),
        entry("wrong", lambda: 2),
        entry("crashing", crashing),
        entry("later", failing_later()),
        entry("refused", lambda: 1),
    ]
    entries[4].result.status = "out of memory: forecast"
    steps: Counter[str] = Counter()
    totals: list[int] = []

    def on_step(name: str, total: int) -> None:
        steps[name] += 1
        totals.append(total)

    results = {r.contestant: r for r in measure(entries, Effort(rounds=6), "base", on_step)}
    assert [result.status for result in results.values()] == [
        "ok",
        "wrong: not 1",
        "unsupported: KeyError: 'a rule'",
        "unsupported: StopIteration: ",
        "out of memory: forecast",
    ]
    assert steps == {"base": 2 + 6, "wrong": 1, "crashing": 1, "later": 3}
    assert sum(steps.values()) <= totals[-1]
    assert sorted(results["base"].seconds) == [WARM_UP, *range(1, 7)]
    assert results["base"].ratio is not None
    assert results["base"].ratio.median == 1
    assert all(results[name].ratio is None for name in ("wrong", "crashing", "later", "refused"))


class Scripted(Entry):
    """An entry whose calls take the seconds that the script says."""

    def __init__(self, name: str, seconds: float) -> None:
        self.result = Result(name, "rival")
        self._seconds = seconds

    def prepare(self) -> None:
        self.time(WARM_UP)

    def weigh(self) -> None:
        self.result.peak_bytes = 1

    def time(self, number: int) -> None:
        self.result.seconds[number] = self._seconds


@pytest.mark.parametrize("slow", [0.2, 0.3])
def test_a_slow_contestant_sits_rounds_out_and_the_baseline_does_not(slow: float) -> None:
    entries = [Scripted("slow", slow), Scripted("base", 0.1), Scripted("fast", 0.01)]
    results = measure(entries, Effort(rounds=40, seconds=1.5, fewest=5, patience=20.0), "base")
    rounds = [len(result.seconds) - 1 for result in results]
    assert rounds == [int(1.5 / slow), 40, 40]
    numbers = sorted(n for n in results[0].seconds if n != WARM_UP)
    gaps = [after - before for before, after in pairwise(numbers)]
    assert max(gaps) - min(gaps) <= 1
    assert results[0].ratio is not None
    assert results[0].ratio.median == pytest.approx(slow / 0.1)


def test_a_call_that_takes_longer_than_anyone_waits_has_its_warm_up_alone() -> None:
    entries = [Scripted("endless", 30.0), Scripted("base", 0.1)]
    endless, base = measure(entries, Effort(), "base")
    assert endless.seconds == {WARM_UP: 30.0}
    assert endless.ratio is not None
    assert endless.ratio.median == pytest.approx(300)
    assert len(base.seconds) > 5


def test_an_answer_is_judged_again_when_its_way_has_learnt() -> None:
    answers = iter([1] * (BEFORE_ROUNDS - 1) + [2])
    entries = [entry("base", lambda: 1), entry("learning", lambda: next(answers))]
    _, learning = measure(entries, Effort(rounds=6), "base")
    assert learning.status == "wrong: not 1"


@pytest.mark.parametrize(("pause", "before", "calls"), [(0.0, BEFORE_ROUNDS, 2), (2 * BRIEF, 2, 1)])
def test_a_brief_call_is_timed_after_untimed_ones(pause: float, before: int, calls: int) -> None:
    made: list[float] = []

    def run() -> int:
        time.sleep(pause)
        made.append(pause)
        return 1

    brief = entry("brief", run)
    brief.prepare()
    assert len(made) == before
    brief.time(1)
    assert len(made) == before + calls
    assert sorted(brief.result.seconds) == [WARM_UP, 1]
