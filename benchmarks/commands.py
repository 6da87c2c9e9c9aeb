"""What the commands do: each measures, prints its table, and writes its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.tree import Tree

from benchmarks.report import readme as figures
from benchmarks.running import progress as presenting
from benchmarks.running.environment import Environment, environment, load_average, pin
from benchmarks.running.progress import console
from benchmarks.running.records import ROOT, Run
from benchmarks.running.suite import Order, run_suite
from benchmarks.running.worker import questions
from benchmarks.studies import budget, grid, overhead, regret
from benchmarks.verdicts import trust


def run(order: Order) -> None:
    """The suite, with a table a case; what is finished is in the file, whenever it is stopped.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    try:
        with presenting.watching() as watch:
            found = run_suite(order, watch)
    except KeyboardInterrupt:
        console.print(f"Stopped; what is finished is in {order.path}. Go on with --resume.")
        raise
    _say_where({**found.environment, "load_after": load_average()}, [order.path])


def report(stem: Path) -> None:
    """The page, the Markdown and the picture of a suite, from its results files."""
    from benchmarks.report import write_report

    written = write_report(stem)
    console.print(f"Wrote {', '.join(map(str, written))}", soft_wrap=True)


def compare(before: Path, after: Path) -> bool:
    """Did anything become slower?"""
    from benchmarks.verdicts import comparing

    comparison = comparing.compare(Run.read(before), Run.read(after))
    console.print(comparison.table())
    return bool(comparison.regressed)


def write_figures() -> None:
    """Those of the README and the docs, from the results files."""
    written = figures.main(ROOT)
    console.print(f"Wrote {', '.join(map(str, written)) or 'nothing: all are up to date'}")


def run_trust(device: torch.device, output: Path) -> None:
    """Two runs of the same code, and one of slower code, compared."""
    where = _begin(device)
    with presenting.watching() as watch:
        shares = trust.measure(device.type, watch)
    where["load_after"] = load_average()
    console.print(trust.table(shares), "")
    path = output / f"trust-{device.type}.json"
    body = {
        "wanted": trust.WANTED,
        "cases": trust.ONLY,
        "processes": trust.PROCESSES,
        "shares": [{**asdict(share), "pairs": share.pairs} for share in shares],
    }
    presenting.write_json(path, "trust", where, body)
    _say_where(where, [path])


def list_table(table: str) -> None:
    """Questions, their cases, and who takes part."""
    for question in questions(table):
        tree = Tree(f"[bold]{question.name}[/]: {question.asks}", highlight=False)
        cases = tree.add("cases")
        for case in question.cases:
            cases.add(f"{case.name}{' (quick)' if case.is_quick else ''}")
        names = dict.fromkeys(c.name for case in question.cases for c in case.contestants)
        tree.add(f"contestants: {' · '.join(names)}")
        console.print(tree)


def run_overhead(device: torch.device, output: Path) -> None:
    """Ratios of jacfunc's jacrev to torch.func's, at the top level and under vmap."""
    where = _begin(device)
    pairs = presenting.tracked(list(overhead.pairs(device)), "overhead")
    results = [overhead.measure(pair, device.type == "cuda") for pair in pairs]
    where["load_after"] = load_average()
    for level in overhead.TARGETS:
        found = [result for result in results if result.level == level]
        console.print(overhead.table(level, found), "")
    path = output / f"overhead-{device.type}.json"
    body = {
        "rounds": overhead.ROUNDS,
        "width": overhead.WIDTH,
        "batch": overhead.BATCH,
        "targets": overhead.TARGETS,
        "results": [asdict(result) for result in results],
    }
    presenting.write_json(path, "overhead", where, body)
    _say_where(where, [path])


def run_regret(device: torch.device, output: Path, only: str) -> None:
    """By which factor auto and autotune miss the best strategy picked by hand, case by case."""
    where = _begin(device)
    chosen = [case for case in grid.cases() if only in case.name]
    cases = presenting.tracked(chosen, "regret")
    results = [regret.measure(case, device) for case in cases]
    where["load_after"] = load_average()
    console.print(regret.table(results), "")
    if only:
        return
    path = output / f"regret-{device.type}.json"
    body = {
        "summary": regret.summary(results),
        "results": [asdict(result) for result in results],
    }
    presenting.write_json(path, "regret", where, body)
    _say_where(where, [path])


def run_budget(device: torch.device, output: Path) -> None:
    """Jacobians under a tenth of the memory that they would take."""
    where = _begin(device)
    results = [budget.measure(case, device) for case in budget.cases(device)]
    where["load_after"] = load_average()
    console.print(budget.table(results), "")
    path = output / f"budget-{device.type}.json"
    body = {"target": budget.TARGET, "results": [asdict(result) for result in results]}
    presenting.write_json(path, "budget", where, body)
    _say_where(where, [path])


def _begin(device: torch.device) -> Environment:
    pin()
    return environment(device)


def _say_where(where: Environment, paths: Sequence[Path]) -> None:
    machine = f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}"
    load = f"load {where['load_before']} before, {where['load_after']} after"
    console.print(f"On {machine}; {load}.")
    console.print(f"Wrote {', '.join(map(str, paths))}", soft_wrap=True)
