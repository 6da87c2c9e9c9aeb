"""The command line: ``python -m jacfunc compare my_module:make_problem``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jacfunc.compare._compare import compare
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._table import check_extra, check_picture

NO_ANSWER, NO_PROBLEM = 1, 2
"""Exit codes: no strategy gave a right answer; the problem could not be measured."""

WIDTH = 120
"""Columns of a table that is written into a file, which has no width of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: parses the arguments, measures, prints; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        if not str(error).startswith(f"{API}: "):  # a fault in the user's module: show where
            raise
        sys.stderr.write(f"{error}\n")
        return NO_PROBLEM


def run(options: argparse.Namespace) -> int:
    """Write the picture, print the table and what to take; returns the exit code."""
    check_extra()
    from rich.console import Console

    path = check_picture(options.output)
    problem = with_options(load(options.problem), options.wrt, options.whole)
    comparison = compare(
        problem,
        device=options.device,
        seconds=options.seconds,
        memory=options.memory,
        progress=True,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    comparison.picture(path)
    console.print(comparison.table(), "")
    text = f"{comparison!r}\nThe picture is in {path}."
    console.print(text, markup=False, highlight=False)
    is_right = any(result.ok and result.family == "jacfunc" for result in comparison.results)
    return 0 if is_right else NO_ANSWER


def load(spec: str) -> Problem:
    """The problem that ``module:function`` returns, the module being in the current directory."""
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
        # a module that the user's module imports is another matter
        if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
            raise
        raise ValueError(
            f"{API}: the module must be one that Python finds from {here}, got {name!r}. "
            f"Run the command where {name.partition('.')[0]}.py is."
        ) from missing
    make = getattr(module, attribute, None)
    if not callable(make):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"{API}: {name} must have a function {attribute}, got none of that name. "
            f"It has {', '.join(names) or 'no function'}."
        )
    return Problem.of(make())


def with_options(problem: Problem, wrt: str | None, is_whole: bool) -> Problem:
    """The problem with the options of the command line, which are for modules alone."""
    if problem.module is None and (wrt or is_whole):
        raise ValueError(
            f"{API}: --wrt and --whole must come with an nn.Module, got a function. "
            "Return jacfunc.compare.Problem(func, args, argnums=...) to choose its arguments."
        )
    # an option that is left out leaves the problem's own
    changes: dict[str, Any] = {"wrt": wrt} if wrt else {}
    if is_whole:
        changes["per_sample"] = False
    return replace(problem, **changes)


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
