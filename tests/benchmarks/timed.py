"""The quick cases of ``python -m benchmarks`` under pytest-benchmark, which tests skip.

``pytest -o addopts= tests/benchmarks/timed.py`` times them; on CUDA add
``--benchmark-timer=tests.benchmarks.timed.synchronised``.

A contestant that fails is skipped with the reason: pytest-benchmark leaves out of its file whatever
fails. Nobody is run in a process of his own here.
"""

import time
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.cases import by_key
from benchmarks.questions import QUESTIONS
from benchmarks.running.environment import default_device, pin
from jacfunc._measuring import Check, Contestant, Result, failures_in, peak_bytes

pin()
DEVICE = default_device()
CASES = {key: case for key, (_, case) in by_key(QUESTIONS).items() if case.is_quick}
PAIRS = [(key, contestant) for key, case in CASES.items() for contestant in case.contestants]


@cache
def problem_of(key: str) -> tuple[Any, Check]:
    problem = CASES[key].setup(DEVICE)
    return problem, CASES[key].check(problem)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "way"), PAIRS, ids=[f"{key}-{way.name}" for key, way in PAIRS])
def test_question(key: str, way: Contestant[Any], benchmark: Any) -> None:
    result = Result(way.name, way.family)
    with failures_in(result):
        problem, check = problem_of(key)
        run = way.prepare(problem)
        benchmark.group = key
        if way.answers:
            benchmark.extra_info["error"] = check(run())
        if way.counted:
            benchmark.extra_info["peak_bytes"] = peak_bytes(run, DEVICE)
        benchmark.pedantic(run, rounds=CASES[key].effort.fewest, warmup_rounds=1)
    if not result.ok:
        pytest.skip(result.status)


def synchronised() -> float:
    """A clock for pytest-benchmark: it is read when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()
