"""One case in a child process: what it is told, what it does, and what becomes of it.

A child looks up what the names of its task mean. Whose turn it is stands in memory that both see,
for a message every round would wake the parent beside what is being timed.
"""

from __future__ import annotations

import importlib
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

from benchmarks.cases import Case, Question
from benchmarks.running.environment import environment, pin
from benchmarks.running.processes import ANEW, DEVICE_LOST, cause, child, end_with_parent, received
from benchmarks.running.seats import seats
from jacfunc._measuring.clock import Run, seconds_of
from jacfunc._measuring.results import Result, recording
from jacfunc._measuring.rounds import Contestant, Effort
from jacfunc._memory.available import free_bytes

SHARE = 0.8
"""Of the memory that is available, what a case may have on the CPU."""

POLL = 0.25
"""Seconds between two looks at a child."""

NOBODY = -1
OUT_OF_TIME = "out of time"
Turn = Any
"""An array that both processes see: the number of the contestant, and of the step."""


@dataclass(frozen=True)
class Task:
    """Which case, how, and without whom.

    Args:
        table: where the questions are, ``module:NAME``.
        effort: by which rounds and seconds are multiplied.
        planted: by which jacfunc is made slower than it is.
    """

    table: str
    question: str
    case: str
    device: str
    effort: float = 1.0
    planted: float = 1.0
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Results; or the reason why there are none, and whose turn it was (None: the setup's)."""

    results: list[Result] | None
    reason: str = ""
    whose: str | None = None


# --- what names stand for ---


def questions(table: str) -> tuple[Question, ...]:
    """The questions at ``module:NAME``."""
    module, _, name = table.partition(":")
    found: tuple[Question, ...] = getattr(importlib.import_module(module), name)
    return found


def looked_up(task: Task) -> Case:
    """The case of a task, with its effort and what is planted."""
    (question,) = (q for q in questions(task.table) if q.name == task.question)
    (case,) = (case for case in question.cases if case.name == task.case)
    contestants = tuple(planted(c, task.planted, task.device) for c in case.contestants)
    return replace(case, effort=scaled(case.effort, task.effort), contestants=contestants)


def scaled(effort: Effort, factor: float) -> Effort:
    """Fewer or more rounds, and less or more time for them and for a single call."""
    return replace(
        effort,
        rounds=max(effort.fewest, round(effort.rounds * factor)),
        seconds=effort.seconds * factor,
        patience=effort.patience * factor,
    )


def planted(contestant: Contestant[Any], factor: float, device: str) -> Contestant[Any]:
    """Jacfunc made slower on purpose: a comparison of two runs must find it."""
    if factor == 1 or contestant.family != "jacfunc":
        return contestant

    def prepare(problem: Any) -> Run:
        run = contestant.prepare(problem)

        def slowed() -> Any:
            kept: list[Any] = []
            took = seconds_of(lambda: kept.append(run()), torch.device(device))
            end = time.perf_counter() + (factor - 1) * took
            while time.perf_counter() < end:
                continue
            return kept[0]

        return slowed

    return replace(contestant, prepare=prepare)


# --- in the child ---


def work(pipe: connection.Connection, task: Task, turn: Turn) -> None:
    """Measure the case that is named, and send what became of it."""
    device = torch.device(task.device)
    settle(device)
    case = looked_up(task)
    numbers = {contestant.name: n for n, contestant in enumerate(case.contestants)}

    def on_step(name: str) -> None:
        _check(device)
        turn[0], turn[1] = numbers[name], turn[1] + 1

    setup, results = Result("", ""), None
    with recording(setup), seats(device) as place:
        results = case.measure(device, task.without, on_step, place)
    _check(device)
    reason = setup.status.replace("unsupported: ", "unsupported: setup: ")
    pipe.send(Outcome(results, "" if setup.ok else reason))


def tell_environment(pipe: connection.Connection, device: str) -> None:
    """Where cases are measured: the parent leaves the device alone."""
    settle(torch.device(device))
    pipe.send(environment(torch.device(device)))


def settle(device: torch.device) -> None:
    """Threads and precision, a bound on memory, and an end when the parent ends."""
    pin()
    for number in (signal.SIGINT, signal.SIGTERM):
        # they come to the whole group of processes, and the parent ends its child
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if device.type == "cpu" and sys.platform == "linux":
        most = int(SHARE * free_bytes(device))
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _check(device: torch.device) -> None:
    """After some faults a GPU fails whatever follows, which must not be blamed on the next."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(DEVICE_LOST)


# --- in the parent ---


def attempt(task: Task, limit: float, watch: Callable[[str | None], None]) -> Outcome:
    """A case in a child that is ended where one step takes longer than ``limit`` seconds."""
    names = [contestant.name for contestant in looked_up(task).contestants]
    turn = ANEW.RawArray("q", (NOBODY, 0))
    step, since = 0, time.monotonic()
    with child(ANEW, work, task, turn) as (process, pipe):
        while not connection.wait([pipe, process.sentinel], POLL):
            if turn[1] != step:
                step, since = turn[1], time.monotonic()
            watch(_name(names, turn))
            if time.monotonic() - since > limit:
                return Outcome(None, OUT_OF_TIME, _name(names, turn))
        found = received(process, pipe)
        if isinstance(found, Outcome):
            return found
        return Outcome(None, cause(found), _name(names, turn))


def _name(names: Sequence[str], turn: Turn) -> str | None:
    return None if turn[0] == NOBODY else names[turn[0]]
