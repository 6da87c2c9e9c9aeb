"""How fast this machine is, and how much memory it has left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jacfunc._forecasting.machine import Machine, power_of_four
from jacfunc._forecasting.machines import machine
from jacfunc._memory.available import free_bytes
from jacfunc._memory.counting import PeakBytes
from tests.house.calls import is_call, num_calls

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.float64], ids=str, scope="module")
def here(request: pytest.FixtureRequest) -> Machine:
    return Machine(CPU, request.param)


def test_everything_takes_time(here: Machine) -> None:
    for name in ("evaluate", "pull", "pull_batch", "push", "push_batch"):
        assert getattr(here, name).seconds(10) > 0, name
    assert here.scaling >= 0
    assert all(here.write(size) > 0 for size in (1, 10**5, 10**6, 10**8))
    assert all(here.flop(k, conv, fwd) > 0 for k in (1, 300) for conv in (0, 1) for fwd in (0, 1))


class Forbidden(TorchDispatchMode):
    """Lets no operation run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was run")


def test_it_is_measured_once(here: Machine) -> None:
    costs = here.write(10**6), here.flop(64, False, False), here.pull
    with Forbidden():
        assert (here.write(1_100_000), here.flop(60, False, True), here.pull) == costs
    assert machine(CPU, torch.float64) is machine(CPU, torch.float64)


def test_it_may_be_measured_in_inference_mode() -> None:
    with torch.inference_mode():
        new = Machine(CPU, torch.float32)
        for name in ("evaluate", "pull", "pull_each", "pull_batch", "push", "push_batch"):
            assert getattr(new, name).seconds(10) > 0, name


def test_a_disturbed_call_does_not_count() -> None:
    took = iter([1.0, 0.5, 1e-3])
    busy = Machine(CPU, torch.float32, clock=lambda run, device: next(took))
    assert busy.write(10**5) == pytest.approx(1e-3 / 4**8)
    quiet = Machine(CPU, torch.float32, clock=lambda run, device: 1e-6)
    assert quiet.write(10**5) == pytest.approx(1e-6 / 4**8)


def counted(run: Callable[[], Any], device: torch.device) -> float:
    """How many functions of Python and C are called, as one second each."""
    return float(num_calls(run, is_call))


def test_rows_one_by_one_take_a_pullback_and_a_copy_each() -> None:
    """What is made once for all rows, or once a call, is no part of it."""
    here = Machine(CPU, torch.float32, clock=counted)
    assert 0.9 * here.pull.call < here.pull_each.call < 1.2 * here.pull.call


def test_each_number_of_threads_is_measured_for_itself() -> None:
    threads, before = torch.get_num_threads(), machine(CPU, torch.float64)
    try:
        torch.set_num_threads(threads + 1)
        assert machine(CPU, torch.float64) is not before
    finally:
        torch.set_num_threads(threads)
    assert machine(CPU, torch.float64) is before


FIRST_CALL = """
import sys, torch, jacfunc
from torch import nn
from jacfunc._forecasting.machine import Machine

def bytes_of(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return 1024 * int(line.split()[1])

model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
jacfunc.jacobian(lambda x: model(x).sin())(torch.ones(3))
for strategy in ("auto", "structured"):
    jacfunc.module_jacobian(model, per_sample=True, strategy=strategy)(torch.ones(2, 3))
before, fresh = bytes_of("VmRSS"), Machine(torch.device("cpu"), torch.float64)
fresh.write(10**9), fresh.flop(1, False, False), fresh.flop(256, True, True)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
print(bytes_of("VmHWM") - before < 2**25)
"""


def test_the_first_call_of_a_process_takes_little_memory() -> None:
    """Torch's compiler would take a second and 75 MB, blocks of new pages twice 32 MiB."""
    run = [sys.executable, "-c", FIRST_CALL]
    root = Path(__file__).parents[2]
    told = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout
    assert told.split("\n")[0] == "[]"
    if sys.platform == "linux":
        assert told.split() == ["[]", "True"]


def test_measuring_disturbs_nobody() -> None:
    state = torch.get_rng_state()

    def func(x: torch.Tensor) -> torch.Tensor:
        return x * Machine(CPU, torch.float32).pull_batch.seconds(1)

    with torch.no_grad(), PeakBytes() as counter:
        assert not torch.is_grad_enabled()
        torch.func.vmap(func)(torch.ones(3))
    assert counter.peak < 1000
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("number", "near"), [(0, 4), (1, 4), (7, 4), (9, 16), (100, 64), (999, 256)]
)
def test_sizes_near_each_other_are_measured_as_one(number: int, near: int) -> None:
    assert power_of_four(number, 4, 256) == near


def test_free_memory_is_some_and_not_all() -> None:
    assert 0 < free_bytes(CPU) < 2**50


def test_a_container_has_less(tmp_path: Path) -> None:
    whole = free_bytes(CPU, cgroup=tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU, cgroup=tmp_path) > whole / 2
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    assert free_bytes(CPU, cgroup=tmp_path) == 1_000_000


def test_where_nobody_says_how_much_is_free(tmp_path: Path) -> None:
    assert 0 < free_bytes(CPU, meminfo=tmp_path / "none") < 2**50
