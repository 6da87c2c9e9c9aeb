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
for _ in range(20):  # rows are written down once in these, which takes pages of its own
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


COMPARED = """
import resource, torch, jacfunc
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers = torch.nn.Linear(784, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)
jac, x = jacfunc.module_jacobian(torch.nn.Sequential(*layers)), torch.randn(256, 784)
counts = []
for _ in range(9):
    before = faults()
    jac(x)
    counts.append(faults() - before)
print(sorted(counts[2:])[3])
"""


def test_pages_of_a_comparison_are_there_for_the_next() -> None:
    """Batches are compared at every call here: whether the samples depend, nobody has said."""
    run = [sys.executable, "-W", "ignore", "-c", COMPARED]
    told = subprocess.run(run, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert int(told.stdout) < 300


PIECES = """
import torch
from jacfunc._memory import give_back, keep_heap

def anonymous():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])

keep_heap()
blocks = [torch.ones(2**17) for _ in range(100)]
kept = blocks[::2]
full = anonymous()
del blocks
freed = anonymous()
give_back()
print((full - freed) / 2**19, (full - anonymous()) / 2**19)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else says what a process takes")
def test_pages_between_blocks_in_use_are_given_back() -> None:
    """Of a hundred blocks every second one is free, and the heap's end is in use."""
    run = [sys.executable, "-W", "ignore", "-c", PIECES]
    told = subprocess.run(run, env=dict(os.environ), capture_output=True, text=True, check=True)
    kept, given = map(float, told.stdout.split())
    assert kept < 5
    assert given > 45


SPARING = """
import torch
from jacfunc._memory import sparing

def anonymous():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])

def taken_by_freed():
    before = anonymous()
    blocks = [torch.ones(2**17) for _ in range(100)]
    kept = blocks[::2]
    full = anonymous()
    del blocks
    return (full - anonymous()) / 2**19

with sparing(2**24):
    with sparing(2**26):
        inside = taken_by_freed()
    again = taken_by_freed()
with sparing(None):
    print(inside, again, taken_by_freed())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else says what a process takes")
@pytest.mark.parametrize("is_set", [False, True], ids=["by default", "set by the user"])
def test_on_a_budget_large_blocks_go_back_as_they_are_freed(is_set: bool) -> None:
    """And are kept as before when the work is done; a size that the user has set stays."""
    unset = {name: x for name, x in os.environ.items() if not name.startswith("MALLOC_")}
    environment = unset | ({"MALLOC_MMAP_THRESHOLD_": str(2**25)} if is_set else {})
    run = [sys.executable, "-W", "ignore", "-c", SPARING]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    inside, again, outside = map(float, told.stdout.split())
    assert outside < 5
    assert (inside < 5 and again < 5) if is_set else (inside > 45 and again > 45)


RECURRENT = """
from benchmarks.studies.ladder import share, taken

print(share(taken("GRU", "params", 20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else says what a process takes")
def test_sweeps_of_a_first_call_leave_no_gaps_in_the_heap() -> None:
    """A recurrent layer has many blocks of a hundred kilobytes: gaps took a quarter more."""
    run = [sys.executable, "-W", "ignore", "-c", RECURRENT]
    unset = {name: x for name, x in os.environ.items() if not name.startswith("MALLOC_")}
    told = subprocess.run(run, env=unset, capture_output=True, text=True, check=True)
    assert float(told.stdout) < 1.9


WITHIN = """
import sys, torch, jacfunc
from torch import nn
torch.set_num_threads(1)

def bytes_of(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return 1024 * int(line.split()[1])

def convolving():
    layers = nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5)
    last = nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Linear(120, 10)
    return nn.Sequential(*layers, *last)

kind, megabytes = sys.argv[1], int(sys.argv[2])
out = convolving()(torch.randn(2, 1, 28, 28))
torch.vmap(lambda u: torch.autograd.grad(out, out, u, retain_graph=True))(torch.ones(3, 2, 10))
if kind == "function":
    first, second = torch.randn(256, 64) / 16, torch.randn(64, 64) / 8
    X = torch.randn(megabytes * 2**18 // (256 * 64 + 64 * 64), 256)
    x, jacobian = (first, second), lambda memory: jacfunc.jacobian(
        lambda both: (torch.tanh(X @ both[0]) @ both[1])[:, 0], memory=memory
    )
    result = 4 * len(X) * (256 * 64 + 64 * 64)
else:
    model = convolving()
    each = 40 * sum(param.numel() for param in model.parameters())
    x = torch.randn(megabytes * 2**20 // each, 1, 28, 28)
    jacobian = lambda memory: jacfunc.module_jacobian(model, memory=memory)
    result = len(x) * each
before, code = bytes_of("VmRSS"), bytes_of("RssFile")
J = jacobian(2 * result)(x)
taken = bytes_of("VmHWM") - before - (bytes_of("RssFile") - code)
print(taken / (2 * result))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else says what a process takes")
@pytest.mark.parametrize("kind", ["function", "module"])
def test_the_first_call_of_a_process_keeps_to_its_budget(kind: str) -> None:
    """As the system sees it: the heap takes more than tensors do, and is left in pieces."""
    run = [sys.executable, "-W", "ignore", "-c", WITHIN, kind, "40"]
    told = subprocess.run(run, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert float(told.stdout) <= 1.2
