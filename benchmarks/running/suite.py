"""The suite, a case a child process: what is finished stays, whatever becomes of the next."""

import os
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from typing import Any

from benchmarks.cases import Case, as_record
from benchmarks.contestants import rivals
from benchmarks.report.progress import Watch
from benchmarks.running.environment import LIBRARIES, load_average
from benchmarks.running.processes import ANEW, cause, child, received
from benchmarks.running.records import SUITES, Order, Run
from benchmarks.running.worker import attempt, tell_environment
from jacfunc._measuring import Result, pooled

# Dynamo, for the first dispatch mode of a process imports it, which takes seconds
PRELOADED = ("benchmarks.running.worker", "torch._dynamo")
SETUP = 2.0  # seconds that a case takes beside what its contestants are given, roughly
SAME = (
    *("device", "device_name", "cpus", "system", "python", "torch", "jacfunc", "threads"),
    *("rivals", "effort", "processes"),  # must not differ within one file
)


class CannotRunError(Exception):
    """It cannot be run here, or not so."""


def run_suite(order: Order, watch: Watch) -> Run:
    """Every case of the order that is missing; the file is whole after each of them."""
    # children are forked from a server with all modules and without a device; it keeps the
    # variables that are set here, and precision is each child's own
    os.environ.update(LIBRARIES)
    ANEW.set_forkserver_preload([*PRELOADED, order.table.partition(":")[0]])
    forkserver.ensure_running()
    cases, where = order.chosen(), _environment(order)
    run = begun(order, where)
    missing = {key: case for key, case in cases.items() if order.wants(key, run)}
    calls = {k: case.effort.seconds * len(case.contestants) for k, (_, case) in missing.items()}
    effort, count = SUITES[order.suite].effort, order.processes
    watch.begin({key: count * (SETUP + effort * seconds) for key, seconds in calls.items()})
    for key, (question, case) in missing.items():
        watch.case(key)
        load, start = load_average(), time.monotonic()
        times = [results_of(order, key, case, watch.contestant) for _ in range(order.processes)]
        record = as_record(question, case, pooled(times, case.baseline))
        took = round(time.monotonic() - start, 1)
        run.cases[key] = record | {"took": took, "load": load, "commit": where["commit"]}
        # in the order of the table, whenever they were run; what is no longer there is left out
        run.cases = {key: run.cases[key] for key in cases if key in run.cases}
        run.write(order.path)
        watch.finished(key, record)
    return run


def begun(order: Order, where: Mapping[str, Any]) -> Run:
    """The run that is gone on with, or a new one."""
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
    """The environment as a child sees it, for the parent leaves the device alone."""
    with child(ANEW, tell_environment, order.device) as (process, pipe):
        where = received(process, pipe)
    if not isinstance(where, dict):
        raise CannotRunError(f"run: {order.device} must be there, got {cause(where)}. See above.")
    return where | {"effort": SUITES[order.suite].effort, "processes": order.processes}


def results_of(
    order: Order, key: str, case: Case, watch: Callable[[str | None], None]
) -> list[Result]:
    """A row for every contestant; whoever takes the child along is left out of the next one."""
    lost: dict[str, str] = {}
    while True:
        outcome = attempt(order, key, list(lost), watch)
        if outcome.whose is None:
            break
        lost[outcome.whose] = outcome.reason
    results = {result.contestant: result for result in outcome.results or ()}
    return [
        results.get(c.name) or Result(c.name, c.family, lost.get(c.name, outcome.reason))
        for c in case.contestants
    ]
