"""The command line: ``python -m benchmarks [COMMAND]``; ``--help`` lists them."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

import benchmarks
from benchmarks import commands
from benchmarks.report.tables import console
from benchmarks.running.environment import default_device
from benchmarks.running.order import LIMIT, SUITES, TABLE, Order
from benchmarks.running.records import RESULTS
from benchmarks.running.suite import CannotRunError

STOPPED, MISUSED = 130, 2
STUDIES = {
    "trust": "does compare find what it should?",
    "overhead": "jacrev against torch.func.jacrev",
    "regret": "auto against the best by hand",
    "budget": "under a tenth of the memory",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; without a command, the quick run and its report.

    Returns:
        The exit code: 1 where a comparison found something slower.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(_do(options) or 0)
    except KeyboardInterrupt:
        return STOPPED
    except CannotRunError as error:
        console.print(f"[red]{error}[/]", soft_wrap=True, highlight=False)
        return MISUSED


def _do(options: argparse.Namespace) -> bool | None:
    command = options.command
    if command in STUDIES:
        only = {"only": options.only} if command == "regret" else {}
        return commands.study(command, torch.device(options.device), options.output, **only)
    if command in ("run", None):
        options.resume = options.resume or bool(options.again)
        commands.run(Order(**{field.name: getattr(options, field.name) for field in fields(Order)}))
    match command:
        case "list":
            commands.list_table(options.table)
        case "compare":
            return commands.is_slower(options.before, options.after)
        case "figures":
            commands.write_figures()
        case "report" | None:
            commands.report(options.output / options.suite)
    return None


def _parser() -> argparse.ArgumentParser:
    about = f"{benchmarks.__doc__} Without a command: the quick suite, then its report."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    subparsers = parser.add_subparsers(dest="command")
    output, device, table = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    here = RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS
    output.add_argument("--output", type=Path, default=here, metavar="DIR")
    device.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    where = "where the questions are"
    table.add_argument("--table", default=TABLE, metavar="MODULE:NAME", help=where)
    run = subparsers.add_parser(
        "run", parents=[output, device, table], help="time every contestant"
    )
    _add_run_options(run)
    subparsers.add_parser("list", parents=[table], help="questions, cases and contestants")
    report = subparsers.add_parser("report", parents=[output], help="Markdown and picture")
    report.add_argument("--suite", choices=tuple(SUITES), default="full")
    compare = subparsers.add_parser("compare", help="two results files; fails if one is slower")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    subparsers.add_parser("figures", help="the README's figures, from the results files")
    for name, text in STUDIES.items():
        study = subparsers.add_parser(name, parents=[output, device], help=text)
        if name == "regret":
            part = "cases whose name contains this; not written"
            study.add_argument("--only", default="", metavar="SUBSTRING", help=part)
    parser.set_defaults(**vars(run.parse_args([])))
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--suite", choices=tuple(SUITES), default="quick")
    run.add_argument("--resume", action="store_true", help="run only what the file lacks")
    part = "question/case contains this; a file of their own (-part) unless with --resume"
    again = "resume, and run these cases although the file has them"
    processes = "in which each case is measured; seven for what is to be compared"
    planted = "make jacfunc so much slower, to test compare"
    limit = "for one step of one contestant (default: %(default)g)"
    run.add_argument("--only", default="", metavar="SUBSTRING", help=part)
    run.add_argument("--again", default="", metavar="SUBSTRING", help=again)
    run.add_argument("--processes", type=int, default=1, metavar="COUNT", help=processes)
    run.add_argument("--planted", type=float, default=1.0, metavar="FACTOR", help=planted)
    run.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=limit)


if __name__ == "__main__":
    # whoever ends a run ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
