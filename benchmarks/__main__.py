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
        return _do(options)
    except KeyboardInterrupt:
        return STOPPED
    except CannotRunError as error:
        console.print(f"[red]{error}[/]", soft_wrap=True, highlight=False)
        return MISUSED


def _do(options: argparse.Namespace) -> int:
    match options.command:
        case "list":
            commands.list_table(options.table)
        case "compare":
            return int(commands.is_slower(options.before, options.after))
        case "report":
            commands.report(options.output / options.suite)
        case "figures":
            commands.write_figures()
        case "regret":
            device = torch.device(options.device)
            commands.study("regret", device, options.output, only=options.only)
        case "trust" | "overhead" | "budget":
            commands.study(options.command, torch.device(options.device), options.output)
        case "run":
            commands.run(_order(options))
        case _:
            commands.run(_order(options))
            commands.report(options.output / options.suite)
    return 0


def _order(options: argparse.Namespace) -> Order:
    options.resume = options.resume or bool(options.again)
    return Order(**{field.name: getattr(options, field.name) for field in fields(Order)})


def _parser() -> argparse.ArgumentParser:
    about = f"{benchmarks.__doc__} Without a command: the quick suite, then its report."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    subparsers = parser.add_subparsers(dest="command")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output", type=Path, default=_shortest(RESULTS), metavar="DIR")
    common = argparse.ArgumentParser(add_help=False, parents=[output])
    common.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument(
        "--table", default=TABLE, metavar="MODULE:NAME", help="where the questions are"
    )
    run = subparsers.add_parser("run", parents=[common, table], help="time every contestant")
    _add_run_options(run)
    subparsers.add_parser("list", parents=[table], help="questions, cases and contestants")
    report = subparsers.add_parser("report", parents=[output], help="Markdown and picture")
    report.add_argument("--suite", choices=tuple(SUITES), default="full")
    compare = subparsers.add_parser("compare", help="two results files; fails if one is slower")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    subparsers.add_parser("figures", help="the README's figures, from the results files")
    studies = {
        name: subparsers.add_parser(name, parents=[common], help=text)
        for name, text in STUDIES.items()
    }
    studies["regret"].add_argument(
        "--only", default="", help="cases whose name contains this; not written"
    )
    parser.set_defaults(**vars(run.parse_args([])))
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--suite", choices=tuple(SUITES), default="quick")
    run.add_argument("--resume", action="store_true", help="run only what the file lacks")
    for name, kind, default, unit, text in (
        ("only", str, "", "SUBSTRING", "question/case contains this; a file of their own (-part) "
         "unless with --resume"),
        ("again", str, "", "SUBSTRING", "resume, and run these cases although the file has them"),
        ("processes", int, 1, "COUNT", "in which each case is measured; seven for what is to be "
         "compared"),
        ("planted", float, 1.0, "FACTOR", "make jacfunc so much slower, to test compare"),
        ("limit", float, LIMIT, "SECONDS", "for one step of one contestant (default: %(default)g)"),
    ):  # fmt: skip
        run.add_argument(f"--{name}", type=kind, default=default, metavar=unit, help=text)


def _shortest(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    # whoever ends a run ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
