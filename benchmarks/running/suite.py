"""The suite, a case a child process: what is finished stays, whatever becomes of the next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Question, as_record, by_key
from benchmarks.contestants import rivals
from benchmarks.running.environment import LIBRARIES, load_average
from benchmarks.running.processes import ANEW, cause, child, received
from benchmarks.running.progress import Watch
from benchmarks.running.records import Run
from benchmarks.running.worker import Task, attempt, questions, tell_environment
from jacfunc._measuring.results import Result, pooled

TABLE = "benchmarks.questions:QUESTIONS"

PRELOADED = ("benchmarks.running.worker", "torch._dynamo")
"""Dynamo, for the first dispatch mode of a process imports it, which takes seconds."""

SUITES = {"quick": 0.5, "full": 1.0}
"""By which the effort of a case is multiplied."""

LIMIT = 300.0
"""Seconds of one step of one contestant: it prepares and answers twice, or makes a round."""

SETUP = 2.0
"""Seconds that a case takes beside what its contestants are given, roughly."""

SAME = (
    *("device", "device_name", "cpus", "system", "python", "torch", "jacfunc", "threads"),
    *("rivals", "effort", "processes", "planted"),
)
"""What must not differ between the cases of one file."""


class CannotRunError(Exception):
    """It cannot be run here, or not so."""


@dataclass(frozen=True)
class Order:
    """What is to be run, and where it is written.

    Args:
        only: part of the names of cases.
        resume: what the file has is not run again.
        again: part of the names of cases that are, nevertheless.
        processes: in which each case is measured; a layout of memory is one process's.
    """

    suite: str
    device: str
    output: Path
    only: str = ""
    resume: bool = False
    again: str = ""
    processes: int = 1
    planted: float = 1.0
    limit: float = LIMIT
    table: str = TABLE

    @property
    def path(self) -> Path:
        """A part has a file of its own, unless it adds to the whole one."""
        part = "-part" if self.only and not self.resume else ""
        return self.output / f"{self.suite}-{self.device}{part}.json"

    def chosen(self) -> dict[str, tuple[Question, Case]]:
        """The suite's cases in the order of the table.

        Raises:
            ValueError: two cases have one name.
        """
        found = by_key(questions(self.table))
        return {k: qc for k, qc in found.items() if self.suite == "full" or qc[1].is_quick}

    def wants(self, key: str, run: Run) -> bool:
        """Is a case to be run, given what the file has?"""
        is_missing = key not in run.cases or (bool(self.again) and self.again in key)
        return is_missing and self.only in key

    def task(self, question: Question, case: Case, without: Sequence[str] = ()) -> Task:
        """What a child is told of a case."""
        names = question.name, case.name, self.device
        return Task(self.table, *names, SUITES[self.suite], self.planted, tuple(without))


def run_suite(order: Order, watch: Watch) -> Run:
    """Every case of the order that is missing; the file is whole after each of them."""
    warm_up(order.table)
    cases, where = order.chosen(), _environment(order)
    run = begun(order, where)
    missing = {key: found for key, found in cases.items() if order.wants(key, run)}
    watch.begin({key: expected(case, order) for key, (_, case) in missing.items()})
    for key, (question, case) in missing.items():
        watch.case(key)
        load, start = load_average(), time.monotonic()
        times = [
            results_of(order, question, case, watch.contestant) for _ in range(order.processes)
        ]
        record = as_record(question, case, pooled(times, case.baseline))
        took = round(time.monotonic() - start, 1)
        run.cases[key] = record | {"took": took, "load": load, "commit": where["commit"]}
        # in the order of the table, whenever they were run; what is no longer there is left out
        run.cases = {key: run.cases[key] for key in cases if key in run.cases}
        run.write(order.path)
        watch.finished(key, record)
    return run


def begun(order: Order, where: Mapping[str, Any]) -> Run:
    """The run that is gone on with, or a new one.

    Raises:
        CannotRunError: what is there was measured elsewhere, or otherwise.
    """
    versions = rivals.versions()
    if not (order.resume and order.path.exists()):
        run = Run(order.suite, where, versions, {})
        # at once: or else whoever stops this one soon would go on with the one before
        run.write(order.path)
        return run
    try:
        run = Run.read(order.path)
    except ValueError as error:
        raise CannotRunError(str(error)) from error
    then, now = ({**w, "rivals": r} for w, r in ((run.environment, run.rivals), (where, versions)))
    differ = [f"{n} {then.get(n)!r}, here {now[n]!r}" for n in SAME if then.get(n) != now[n]]
    if differ:
        raise CannotRunError(
            f"run: {order.path} can be gone on with only where it was begun, got "
            f"{'; '.join(differ)}. Begin a new one: leave out --resume."
        )
    return run


def _environment(order: Order) -> dict[str, Any]:
    """As a child sees it, for the parent leaves the device alone."""
    with child(ANEW, tell_environment, order.device) as (process, pipe):
        found = received(process, pipe)
    if not isinstance(found, dict):
        raise CannotRunError(f"run: {order.device} must be there, got {cause(found)}. See above.")
    return {
        **found,
        "effort": SUITES[order.suite],
        "processes": order.processes,
        "planted": order.planted,
    }


def expected(case: Case, order: Order) -> float:
    """Seconds that a case may take."""
    once = SETUP + case.effort.seconds * SUITES[order.suite] * len(case.contestants)
    return order.processes * once


def results_of(
    order: Order, question: Question, case: Case, watch: Callable[[str | None], None]
) -> list[Result]:
    """A row for every contestant; whoever takes the child along is left out of the next one."""
    lost: dict[str, str] = {}
    while True:
        outcome = attempt(order.task(question, case, list(lost)), order.limit, watch)
        if outcome.whose is None:
            break
        lost[outcome.whose] = outcome.reason
    found = {result.contestant: result for result in outcome.results or ()}
    return [
        found.get(c.name) or Result(c.name, c.family, lost.get(c.name, outcome.reason))
        for c in case.contestants
    ]


def warm_up(table: str) -> None:
    """Start the server that children are forked from: with all modules, without a device."""
    # it keeps the variables that are set here; precision is each child's own
    os.environ.update(LIBRARIES)
    ANEW.set_forkserver_preload([*PRELOADED, table.partition(":")[0]])
    forkserver.ensure_running()
