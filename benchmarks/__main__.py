"""The command line: ``python -m benchmarks [COMMAND]``; ``--help`` lists them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import benchmarks
from benchmarks import (
    budget,
    digits,
    grid,
    growth,
    growth_picture,
    overhead,
    picture,
    presenting,
    regret,
    rivals,
    samples,
    structure,
)
from benchmarks.contestants import BASELINE, CONTESTANTS
from benchmarks.environment import Environment, default_device, environment, load_average, pin
from benchmarks.measuring import Result, measure
from benchmarks.reference import reference
from benchmarks.workloads import SUITES, WORKLOADS, prepare

console = Console()
if not console.is_terminal:
    # a log has no width of its own, and rich's 80 columns break the tables
    console = Console(width=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says; without a command, the quick run."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        return list_tables()
    pin()
    device = torch.device(options.device)
    whole = {"overhead": run_overhead, "budget": run_budget}
    if options.command in whole:
        return whole[options.command](device, options.output)
    partly = {"regret": run_regret, "samples": run_samples, "structure": run_structure}
    if options.command in partly:
        return partly[options.command](device, options.output, options.only)
    return run(options.suite, device, options.output)


def run(suite_name: str, device: torch.device, output: Path) -> None:
    """Train, check, time and weigh everything of a suite; print and write what came out."""
    suite, where = SUITES[suite_name], environment(device)
    results: dict[str, list[Result]] = {}
    with _progress() as progress:
        models = {name: _train(name, progress) for name in digits.MODELS}
        for workload in WORKLOADS:
            problem = prepare(workload, models[workload.model][0], suite.batch, device)
            task = progress.add_task(f"time {workload.name}", total=suite.rounds + 2)
            step = partial(progress.advance, task)
            expected = reference(problem)
            results[workload.name] = measure(problem, CONTESTANTS, expected, suite, step)
    where["load_after"] = load_average()
    for name, found in results.items():
        console.print(presenting.table(f"{name}, batch {suite.batch}", found), "")
    stem = output / f"{suite_name}-{device.type}"
    body = {
        "suite": {"name": suite_name, **asdict(suite)},
        "baseline": BASELINE,
        "accuracy": {name: accuracy for name, (_, accuracy) in models.items()},
        "workloads": {name: presenting.as_record(found) for name, found in results.items()},
    }
    presenting.write_json(stem.with_suffix(".json"), "run", where, body)
    title = f"Per-sample Jacobians, batch {suite.batch}, {_machine(where)}"
    picture.draw(stem.with_suffix(".svg"), title, results)
    _say_where(where, [stem.with_suffix(".json"), stem.with_suffix(".svg")])


def run_overhead(device: torch.device, output: Path) -> None:
    """Ratios of jacfunc's jacrev to torch.func's, at the top level and under vmap."""
    where = environment(device)
    with _progress() as progress:
        pairs = progress.track(list(overhead.pairs(device)), description="overhead")
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
    where = environment(device)
    with _progress() as progress:
        chosen = [case for case in grid.cases() if only in case.name]
        cases = progress.track(chosen, description="regret")
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
    where = environment(device)
    results = [budget.measure(case, device) for case in budget.cases(device)]
    where["load_after"] = load_average()
    console.print(budget.table(results), "")
    path = output / f"budget-{device.type}.json"
    body = {"target": budget.TARGET, "results": [asdict(result) for result in results]}
    presenting.write_json(path, "budget", where, body)
    _say_where(where, [path])


def run_samples(device: torch.device, output: Path, only: str) -> None:
    """Per-sample parameter Jacobians by jacfunc, by the recipe, and by other libraries."""
    where, versions = environment(device), rivals.versions()
    found = {}
    with _progress() as progress:
        chosen = [case for case in samples.cases() if only in case.name]
        for case in progress.track(chosen, description="samples"):
            results = samples.measure(case, device)
            found[case.name] = samples.as_record(case, results)
            progress.console.print(samples.table(case, results), "")
    where["load_after"] = load_average()
    if only:
        return
    # a run without the rivals must not replace one with them
    kind = "rivals" if any(versions.values()) else "samples"
    path = output / f"{kind}-{device.type}.json"
    presenting.write_json(path, kind, where, {"rivals": versions, "cases": found})
    _say_where(where, [path])


def run_structure(device: torch.device, output: Path, only: str) -> None:
    """Kernels, curvature and reused buffers beside recipes and rivals, and growth drawn."""
    where, versions = environment(device), rivals.versions()
    found = {}
    with _progress() as progress:
        chosen = [case for case in structure.CASES if only in case.name]
        for case in progress.track(chosen, description="structure"):
            results = structure.measure(case, device)
            found[case.name] = structure.as_record(case, results)
            progress.console.print(structure.table(case, results), "")
        axes = [axis for axis in growth.AXES if only in axis.name]
        measured = progress.track(axes, description="growth")
        curves = [curve for axis in measured for curve in growth.measure(axis, device)]
    where["load_after"] = load_average()
    if curves:
        console.print(growth.table(curves), "")
    if only:
        return
    path = output / f"structure-{device.type}.json"
    body = {"rivals": versions, "cases": found, "growth": [asdict(curve) for curve in curves]}
    presenting.write_json(path, "structure", where, body)
    title = f"Growth of an NTK's time, {_machine(where)}"
    growth_picture.draw(path.with_suffix(".svg"), title, curves)
    _say_where(where, [path, path.with_suffix(".svg")])


def list_tables() -> None:
    """Print the suites, workloads and contestants."""
    for heading, names in (
        ("suites", list(SUITES)),
        ("workloads", [workload.name for workload in WORKLOADS]),
        ("contestants", [contestant.name for contestant in CONTESTANTS]),
    ):
        console.print(f"[bold]{heading}[/]: {', '.join(names)}")


def _train(name: str, progress: Progress) -> tuple[nn.Module, float]:
    task = progress.add_task(f"train {name}", total=digits.EPOCHS)
    model, accuracy = digits.train(name, partial(progress.advance, task))
    progress.console.print(f"{name}: {accuracy:.1%} of the held-out digits right")
    return model, accuracy


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _machine(where: Environment) -> str:
    return f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}"


def _say_where(where: Environment, paths: Sequence[Path]) -> None:
    load = f"load {where['load_before']} before, {where['load_after']} after"
    console.print(f"On {_machine(where)}; {load}.")
    console.print(f"Wrote {', '.join(map(str, paths))}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__)
    commands = parser.add_subparsers(dest="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    common.add_argument("--output", type=Path, default=_shortest(presenting.RESULTS))
    partly = argparse.ArgumentParser(add_help=False, parents=[common])
    partly.add_argument("--only", default="", help="cases whose name contains this; not written")
    timed = commands.add_parser("run", parents=[common], help="time every contestant (default)")
    timed.add_argument("--suite", choices=tuple(SUITES), default="quick")
    commands.add_parser("overhead", parents=[common], help="jacrev against torch.func.jacrev")
    commands.add_parser("regret", parents=[partly], help="auto against the best by hand")
    commands.add_parser("budget", parents=[common], help="under a tenth of the memory")
    commands.add_parser("samples", parents=[partly], help="per-sample J, and rivals")
    commands.add_parser("structure", parents=[partly], help="NTK, GGN, out=, growth, and rivals")
    commands.add_parser("list", help="suites, workloads and contestants")
    parser.set_defaults(**vars(timed.parse_args([])), command="run")
    return parser


def _shortest(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
