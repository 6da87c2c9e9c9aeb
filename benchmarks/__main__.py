"""The command line: ``python -m benchmarks [COMMAND]``; ``--help`` lists them."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks
from benchmarks import commands
from benchmarks.running import suite as runner
from benchmarks.running.environment import default_device
from benchmarks.running.progress import console
from benchmarks.running.records import RESULTS
from benchmarks.running.suite import CannotRunError, Order

STOPPED, MISUSED = 130, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; without a command, the quick run, then its page.

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
            return int(commands.compare(options.before, options.after))
        case "report":
            commands.report(options.output / options.suite)
        case "figures":
            commands.write_figures()
        case "trust":
            commands.run_trust(torch.device(options.device), options.output)
        case "overhead":
            commands.run_overhead(torch.device(options.device), options.output)
        case "budget":
            commands.run_budget(torch.device(options.device), options.output)
        case "regret":
            commands.run_regret(torch.device(options.device), options.output, options.only)
        case "run":
            commands.run(_order(options))
        case _:
            commands.run(_order(options))
            commands.report(options.output / options.suite)
    return 0


def _order(options: argparse.Namespace) -> Order:
    resume = options.resume or bool(options.again)
    return Order(
        options.suite,
        options.device,
        options.output,
        only=options.only,
        resume=resume,
        again=options.again,
        processes=options.processes,
        planted=options.planted,
        limit=options.limit,
        table=options.table,
    )


def _parser() -> argparse.ArgumentParser:
    described = f"{benchmarks.__doc__} Without a command: the quick suite, then its report."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=described)
    subparsers = parser.add_subparsers(dest="command")
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--output", type=Path, default=_shortest(RESULTS), metavar="DIR")
    common = argparse.ArgumentParser(add_help=False, parents=[written])
    common.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument(
        "--table", default=runner.TABLE, metavar="MODULE:NAME", help="where the questions are"
    )
    run = subparsers.add_parser("run", parents=[common, table], help="time every contestant")
    _add_run_options(run)
    subparsers.add_parser("list", parents=[table], help="questions, cases and contestants")
    report = subparsers.add_parser("report", parents=[written], help="page, Markdown and picture")
    report.add_argument("--suite", choices=tuple(runner.SUITES), default="full")
    compare = subparsers.add_parser("compare", help="two results files; fails if one is slower")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    subparsers.add_parser("figures", help="the README's figures, from the results files")
    subparsers.add_parser("trust", parents=[common], help="does compare find what it should?")
    subparsers.add_parser("overhead", parents=[common], help="jacrev against torch.func.jacrev")
    regret = subparsers.add_parser("regret", parents=[common], help="auto against the best by hand")
    regret.add_argument("--only", default="", help="cases whose name contains this; not written")
    subparsers.add_parser("budget", parents=[common], help="under a tenth of the memory")
    parser.set_defaults(**vars(run.parse_args([])))
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--suite", choices=tuple(runner.SUITES), default="quick")
    run.add_argument(
        "--only",
        default="",
        metavar="SUBSTRING",
        help="question/case contains this; a file of their own (-part) unless with --resume",
    )
    run.add_argument("--resume", action="store_true", help="run only what the file lacks")
    run.add_argument(
        "--again",
        default="",
        metavar="SUBSTRING",
        help="resume, and run these cases although the file has them",
    )
    run.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="COUNT",
        help="in which each case is measured; seven for what is to be compared",
    )
    run.add_argument(
        "--planted",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="make jacfunc so much slower, to test compare",
    )
    run.add_argument(
        "--limit",
        type=float,
        default=runner.LIMIT,
        metavar="SECONDS",
        help="for one step of one contestant (default: %(default)g)",
    )


def _shortest(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    # whoever ends a run ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
