"""A young process does not ask the system for the same pages in each call."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep what is freed in other ways"
)

CALLS = 20

FAULTS = """
import resource, sys, torch, jacfunc
strategy, calls = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first, second = torch.randn(784, 2048), torch.randn(2048, 10)
x = torch.randn(64, 784)
def f(s):
    return (torch.tanh(x @ first * s.sum()) @ second).sum(0) * s
by_all = jacfunc.jacobian(f, strategy=strategy)
for _ in range(10):
    by_all(torch.ones(10))
before = faults()
for _ in range(calls):
    by_all(torch.ones(10))
print(faults() - before)
"""


def faults_of_a_call(strategy: str, **settings: str) -> float:
    unset = {name: x for name, x in os.environ.items() if not name.startswith("MALLOC_")}
    environment = unset | settings
    run = [sys.executable, "-W", "ignore", "-c", FAULTS, strategy, str(CALLS)]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    return int(told) / CALLS


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
def test_what_a_call_takes_for_a_while_is_there_for_the_next(strategy: str) -> None:
    """Unless somebody has said how much the heap is to keep: that stays as it is."""
    chosen = faults_of_a_call(strategy, MALLOC_TRIM_THRESHOLD_="131072")
    assert faults_of_a_call(strategy) < chosen / 20
