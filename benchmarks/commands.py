"""What the commands do: each measures, prints its table, and writes its file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.tree import Tree

from benchmarks.report import comparison, page, readme
from benchmarks.report.progress import watching
from benchmarks.report.tables import console
from benchmarks.running.environment import environment, load_average, pin
from benchmarks.running.order import Order, questions
from benchmarks.running.records import ROOT, Run, replace
from benchmarks.running.suite import run_suite
from benchmarks.studies import STUDIES
from benchmarks.verdicts.comparing import compare


def run(order: Order) -> None:
    """The suite, with a table a case; what is finished is in the file, whenever it is stopped.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    try:
        with watching() as watch:
            measured = run_suite(order, watch)
    except KeyboardInterrupt:
        console.print(f"Stopped; what is finished is in {order.path}. Go on with --resume.")
        raise
    _say_where({**measured.environment, "load_after": load_average()}, order.path)


def study(kind: str, device: torch.device, output: Path, **options: Any) -> None:
    """One of the studies beside the suite; a part of one is shown, not written."""
    pin()
    where = environment(device)
    body = STUDIES[kind].measure(device, **options)
    where["load_after"] = load_average()
    for shown in STUDIES[kind].tables(body):
        console.print(shown, "")
    if not any(options.values()):
        path = output / f"{kind}-{device.type}.json"
        record = {"kind": kind, "environment": where, **body}
        replace(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        _say_where(where, path)


def report(stem: Path) -> None:
    """The Markdown and the picture of a suite, from its results files."""
    _say_what(*page.write_report(stem))


def write_figures() -> None:
    """The figures of the README and the docs, from the results files."""
    _say_what(*readme.main(ROOT))


def is_slower(before: Path, after: Path) -> bool:
    """Did anything become slower?"""
    compared = compare(Run.read(before), Run.read(after))
    console.print(comparison.table_of(compared))
    return bool(compared.regressed)


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


def _say_where(where: Mapping[str, Any], path: Path) -> None:
    machine = f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}"
    console.print(f"On {machine}; load {where['load_before']} before, {where['load_after']} after.")
    _say_what(path)


def _say_what(*paths: Path) -> None:
    names = ", ".join(map(str, paths)) or "nothing: all are up to date"
    console.print(f"Wrote {names}", soft_wrap=True)
