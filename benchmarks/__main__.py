"""The command line: ``python -m benchmarks [COMMAND]``; ``--help`` lists them."""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.tree import Tree

import benchmarks
from benchmarks.report import page, readme
from benchmarks.report.progress import watching
from benchmarks.report.tables import console, of_targets, table_of
from benchmarks.running import records
from benchmarks.running.environment import default_device, environment, load_average, pin
from benchmarks.running.records import Order, Run
from benchmarks.running.suite import CannotRunError, run_suite
from benchmarks.studies import STUDIES
from benchmarks.verdicts.comparing import compare

STOPPED, MISUSED = 130, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code is 1 where a comparison finds what is slower."""
    options = _parser().parse_args(arguments)
    try:
        return int(_do(options))
    except KeyboardInterrupt:
        return STOPPED
    except CannotRunError as error:
        console.print(f"[red]{error}[/]", soft_wrap=True, highlight=False)
        return MISUSED


def _do(options: argparse.Namespace) -> bool:
    """Did a comparison find something slower?"""
    match options.command:
        case "list":
            list_table(options.table)
        case "compare":
            comparison = compare(Run.read(options.before), Run.read(options.after))
            console.print(table_of(comparison))
            return bool(comparison.regressed)
        case "figures":
            _say(*readme.main(records.ROOT))
        case "report":
            _say(*page.write_report(options.output / options.suite))
        case "run" | None:
            options.resume = options.resume or bool(options.again)
            run(Order(**{field.name: getattr(options, field.name) for field in fields(Order)}))
            if options.command is None:
                _say(*page.write_report(options.output / options.suite))
        case kind:
            study(kind, torch.device(options.device), options.output)
    return False


def run(order: Order) -> None:
    """The suite, with a table a case; what is finished is in the file, whenever it is stopped."""
    try:
        with watching() as watch:
            done = run_suite(order, watch)
    except KeyboardInterrupt:
        console.print(f"Stopped; what is finished is in {order.path}. Go on with --resume.")
        raise
    console.print(of_targets(done.cases.values()))
    _say_where({**done.environment, "load_after": load_average()}, order.path)


def study(kind: str, device: torch.device, output: Path) -> None:
    """One of the studies beside the suite."""
    pin()
    where = environment(device)
    body = STUDIES[kind].measure(device)
    where["load_after"] = load_average()
    for shown in STUDIES[kind].tables(body):
        console.print(shown, "")
    path, record = output / f"{kind}-{device.type}.json", {"kind": kind, "environment": where}
    records.replace(path, json.dumps(record | body, indent=1, ensure_ascii=False) + "\n")
    _say_where(where, path)


def list_table(table: str) -> None:
    """Questions, their cases, and who takes part."""
    for question in records.questions(table):
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
    _say(path)


def _say(*paths: Path) -> None:
    names = ", ".join(map(str, paths)) or "nothing: all are up to date"
    console.print(f"Wrote {names}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    about = f"{benchmarks.__doc__} Without a command: the quick suite, then its report."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    add = parser.add_subparsers(dest="command").add_parser
    output, device, table = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    here, path = Path.cwd(), records.RESULTS
    path = path.relative_to(here) if path.is_relative_to(here) else path
    output.add_argument("--output", type=Path, default=path, metavar="DIR")
    device.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    where = "where the questions are"
    table.add_argument("--table", default=records.TABLE, metavar="MODULE:NAME", help=where)
    run = add("run", parents=[output, device, table], help="time every contestant")
    _add_run_options(run)
    add("list", parents=[table], help="questions, cases and contestants")
    report = add("report", parents=[output], help="page and picture")
    report.add_argument("--suite", choices=tuple(records.SUITES), default="full")
    compare = add("compare", help="two results files; fails if one is slower")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    add("figures", help="the README's figures, from the results files")
    for name, file in STUDIES.items():
        add(name, parents=[output, device], help=file.__doc__)
    parser.set_defaults(**vars(run.parse_args([])))
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--suite", choices=tuple(records.SUITES), default="quick")
    run.add_argument("--resume", action="store_true", help="run only what the file lacks")
    part = "question/case contains this; a file of their own (-part) unless with --resume"
    again = "resume, and run these cases although the file has them"
    count = "in which each case is measured; seven for what is to be compared"
    limit = "for one step of one contestant (default: %(default)g)"
    run.add_argument("--only", default="", metavar="SUBSTRING", help=part)
    run.add_argument("--again", default="", metavar="SUBSTRING", help=again)
    run.add_argument("--processes", type=int, default=1, metavar="COUNT", help=count)
    run.add_argument("--limit", type=float, default=records.LIMIT, metavar="SECONDS", help=limit)


if __name__ == "__main__":
    # whoever ends a run ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
