"""One case in a child process: what it is told, what it does, and what becomes of it.

A child is told names, and looks up what they mean. Whose turn it is stands in memory that both
processes see: a message every round would wake the parent beside what is being timed.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.running import processes
from benchmarks.running.environment import environment, pin
from benchmarks.running.records import SUITES, Order
from jacfunc._measuring import Effort, Result, failures_in
from jacfunc._memory import free_bytes

SHARE = 0.8  # of the memory that is available, what a case may have on the CPU
POLL, NOBODY = 0.25, -1  # seconds between two looks at a child


@dataclass(frozen=True)
class Outcome:
    """Results; or the reason why there are none, and whose turn it was (None: the setup's)."""

    results: list[Result] | None
    reason: str = ""
    whose: str | None = None


def looked_up(order: Order, key: str) -> Case:
    """The case of this name, with the suite's effort."""
    _, case = order.chosen()[key]
    return replace(case, effort=scaled(case.effort, SUITES[order.suite].effort))


def scaled(effort: Effort, factor: float) -> Effort:
    """Fewer or more rounds, and less or more time for them and for a single call."""
    rounds = max(effort.fewest, round(effort.rounds * factor))
    seconds, patience = effort.seconds * factor, effort.patience * factor
    return replace(effort, rounds=rounds, seconds=seconds, patience=patience)


def work(
    pipe: connection.Connection, order: Order, key: str, without: Sequence[str], turn: Any
) -> None:
    """Measure the case that is named, and send what became of it.
    ``turn`` is seen by both processes: the number of the contestant, and of the step.
    """
    device = torch.device(order.device)
    settle(device)
    case = looked_up(order, key)
    numbers = {contestant.name: n for n, contestant in enumerate(case.contestants)}

    def on_step(name: str, total: int) -> None:
        _check(device)
        turn[0], turn[1] = numbers[name], turn[1] + 1

    # a process alike has none of the threads that this one has started, and would wait for them
    is_apart = SUITES[order.suite].is_apart and case.threads == 1
    setup, results = Result("", ""), None
    with failures_in(setup), processes.seats(device, is_apart) as place:
        results = case.measure(device, without, on_step, place)
    _check(device)
    reason = setup.status.replace("unsupported: ", "unsupported: setup: ")
    pipe.send(Outcome(results, "" if setup.ok else reason))


def tell_environment(pipe: connection.Connection, device: str) -> None:
    """Send where cases are measured: the parent leaves the device alone."""
    settle(torch.device(device))
    pipe.send(environment(torch.device(device)))


def settle(device: torch.device) -> None:
    """Set threads and precision, a bound on memory, and an end when the parent ends."""
    pin()
    for number in (signal.SIGINT, signal.SIGTERM):
        # they come to the whole group of processes, and the parent ends its child
        signal.signal(number, signal.SIG_IGN)
    processes.end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if device.type == "cpu" and sys.platform == "linux":
        most = int(SHARE * free_bytes(device))
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _check(device: torch.device) -> None:
    """End where a GPU fails whatever follows a fault: the next contestant is not to blame."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(processes.DEVICE_LOST)


def attempt(
    order: Order, key: str, without: Sequence[str], watch: Callable[[str | None], None]
) -> Outcome:
    """A case in a child that is ended where one step takes longer than the order's limit."""
    names = [contestant.name for contestant in order.chosen()[key][1].contestants]
    turn = processes.ANEW.RawArray("q", (NOBODY, 0))

    def whose() -> str | None:
        return None if turn[0] == NOBODY else names[turn[0]]

    step, since = 0, time.monotonic()
    with processes.child(processes.ANEW, work, order, key, tuple(without), turn) as (process, pipe):
        while not connection.wait([pipe, process.sentinel], POLL):
            if turn[1] != step:
                step, since = turn[1], time.monotonic()
            watch(whose())
            if time.monotonic() - since > order.limit:
                return Outcome(None, "out of time", whose())
        outcome = processes.received(process, pipe)
    if isinstance(outcome, Outcome):
        return outcome
    return Outcome(None, processes.cause(outcome), whose())
