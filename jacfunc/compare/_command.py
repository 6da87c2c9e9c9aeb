"""The command line: ``python -m jacfunc compare my_module:make_problem``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jacfunc.compare._compare import compare
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._table import check_extra, check_picture

NO_ANSWER, NO_PROBLEM = 1, 2
"""Exit codes: no strategy was right; what was asked for could not be measured."""

WIDTH = 120
"""Of a log, which has none of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        if not str(error).startswith(f"{API}: "):  # a fault in the user's module: show where
            raise
        sys.stderr.write(f"{error}\n")
        return NO_PROBLEM


def run(options: argparse.Namespace) -> int:
    """Compare, show the table, say what to take, write the picture."""
    check_extra()
    from rich.console import Console

    path = check_picture(options.output)
    problem = with_options(load(options.problem), options.wrt, options.whole)
    found = compare(
        problem,
        device=options.device,
        seconds=options.seconds,
        memory=options.memory,
        progress=True,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    found.picture(path)
    console.print(found.table(), "")
    console.print(
        repr(found), f"The picture is in {path}.", sep="\n", markup=False, highlight=False
    )
    right = any(result.ok and result.family == "jacfunc" for result in found.results)
    return 0 if right else NO_ANSWER


def load(spec: str) -> Problem:
    """The problem that ``module:function`` returns; the module is looked for from here."""
    name, colon, attribute = spec.partition(":")
    if not (name and colon and attribute):
        raise ValueError(
            f"{API}: the problem must be named as module:function, got {spec!r}. "
            "Write my_module:make_problem for the function make_problem in my_module.py."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        # what the user's module imports in turn is another matter
        if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
            raise
        raise ValueError(
            f"{API}: the module must be one that Python finds from {here}, got {name!r}. "
            f"Run the command where {name.partition('.')[0]}.py is."
        ) from missing
    make = getattr(module, attribute, None)
    if not callable(make):
        there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"{API}: {name} must have a function {attribute}, got none of that name. "
            f"It has {', '.join(there) or 'no function'}."
        )
    return Problem.of(make())


def with_options(problem: Problem, wrt: str | None, is_whole: bool) -> Problem:
    """What the command line says of a module."""
    if problem.module is None and (wrt or is_whole):
        raise ValueError(
            f"{API}: --wrt and --whole must come with an nn.Module, got a function. "
            "Return jacfunc.compare.Problem(func, args, argnums=...) to choose its arguments."
        )
    # not what was left out: a Problem has its own
    said = {"wrt": wrt} if wrt else {}
    return replace(problem, **said, **({"per_sample": False} if is_whole else {}))  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jacfunc")
    commands = parser.add_subparsers(required=True, metavar="compare")
    command = commands.add_parser(
        "compare",
        help="measure every strategy on a model or function of yours",
        description="Which strategy, for my model, on my hardware? All are measured.",
    )
    command.add_argument(
        "problem",
        metavar="module:function",
        help="a function that returns (module, *inputs), (func, *args) or a Problem",
    )
    command.add_argument("--wrt", choices=("params", "inputs"), help="what of a module is varied")
    command.add_argument(
        "--whole", action="store_true", help="the batch as a whole, not by samples"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="by default that of the problem")
    command.add_argument("--seconds", type=float, default=1.5, help="of timing for each strategy")
    command.add_argument("--memory", help='for auto and autotune to keep to: "2 GiB"')
    command.add_argument("--output", default="compare.svg", help="the picture (compare.svg)")
    return parser
