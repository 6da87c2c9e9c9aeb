"""The quick cases of ``python -m benchmarks`` under pytest-benchmark: ``pytest benchmarks``.

A contestant that fails is skipped with the reason: pytest-benchmark leaves out of its file whatever
fails. Nobody is run in a process of his own here.
"""

from functools import cache
from typing import Any

import pytest

from benchmarks.cases import Case, by_key
from benchmarks.questions import QUESTIONS
from benchmarks.running.environment import default_device, pin
from jacfunc._measuring.clock import peak_bytes
from jacfunc._measuring.results import Result, recording
from jacfunc._measuring.rounds import Check, Contestant

pin()
DEVICE = default_device()
CASES = {key: case for key, (_, case) in by_key(QUESTIONS).items() if case.is_quick}
PAIRS = [(key, contestant.name) for key, case in CASES.items() for contestant in case.contestants]


@cache
def problem(key: str) -> tuple[Any, Check]:
    found = CASES[key].setup(DEVICE)
    return found, CASES[key].check(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "name"), PAIRS, ids=[f"{key}-{name}" for key, name in PAIRS])
def test_question(key: str, name: str, benchmark: Any) -> None:
    result = Result(name, "")
    with recording(result):
        _time(CASES[key], key, name, benchmark)
    if not result.ok:
        pytest.skip(result.status)


def _time(case: Case, key: str, name: str, benchmark: Any) -> None:
    given, check = problem(key)
    contestant = _contestant(case, name)
    run = contestant.prepare(given)
    benchmark.group = key
    if contestant.answers:
        benchmark.extra_info["error"] = check(run())
    if contestant.counted:
        benchmark.extra_info["peak_bytes"] = peak_bytes(run, DEVICE)
    benchmark.pedantic(run, rounds=case.effort.fewest, warmup_rounds=1)


def _contestant(case: Case, name: str) -> Contestant[Any]:
    return next(contestant for contestant in case.contestants if contestant.name == name)
