"""The table of ``python -m benchmarks`` as pytest-benchmark cases."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import nn

from benchmarks import contestants, digits, workloads
from benchmarks.environment import default_device, pin
from benchmarks.reference import check, reference
from benchmarks.workloads import Answer, Problem

pin()
BATCH = workloads.SUITES["quick"].batch


@cache
def trained(name: str) -> nn.Module:
    return digits.train(name)[0]


@cache
def judged(name: str) -> tuple[Problem, Answer]:
    workload = workloads.named(name)
    problem = workloads.prepare(workload, trained(workload.model), BATCH, default_device())
    return problem, reference(problem)


@pytest.mark.parametrize("contestant", [contestant.name for contestant in contestants.CONTESTANTS])
@pytest.mark.parametrize("workload", [workload.name for workload in workloads.WORKLOADS])
def test_digits(workload: str, contestant: str, benchmark: Any) -> None:
    problem, expected = judged(workload)
    run = contestants.named(contestant).prepare(problem)
    benchmark.extra_info["error"] = check(run(), expected)
    benchmark.group = workload
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
