"""How much slower than the best strategy is what `auto` and `autotune` choose? A row a case."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optree
import torch
from rich.progress import track
from rich.table import Table

import jacfunc
from benchmarks.report.tables import add, console, in_seconds, table
from benchmarks.studies.grid import cases
from jacfunc import Strategy
from jacfunc._measuring import Contestant, Effort, Entry, Result, interleaved
from jacfunc._measuring import measure as measure_all
from jacfunc.compare import Problem

CHUNKS = (16, 128, 512)
MOST_LOOPS = 256

TARGETS = {"auto": (1.10, 0.90), "autotune": (1.05, 0.95)}
"""Largest wanted regret, and the share of cases in which it must hold."""

BEST, AGAIN = "best", "best again"
"""The best against itself: how far noise alone carries a ratio from 1."""

HOPELESS = 3.0
"""A candidate that is slower than the best by this factor is not timed again."""

WEEDING = Effort(rounds=5, seconds=0.05, fewest=1, patience=1.0)
EFFORT = Effort(rounds=300, seconds=0.4, fewest=5, patience=60.0)

MIDDLING, PLANNINGS = 0.01, 5
"""Seconds of a call from which on what planning adds to the first one is looked at; how often."""


def candidates(problem: Problem) -> dict[str, str | Strategy]:
    """What a careful person would try by hand."""
    (x,) = problem.args
    out = problem.target(x)
    if problem.module is not None:
        out, x = out[0], x[0]
    rows, columns = out.numel(), x.numel()
    if problem.module is not None and problem.by_params:
        columns = sum(param.numel() for param in problem.module.parameters())
    strategies: dict[str, str | Strategy] = {}
    for name, make, total in (
        ("reverse", jacfunc.Reverse, rows),
        ("forward", jacfunc.Forward, columns),
    ):
        strategies[name] = make()
        strategies |= {f"{name} {size}": make(size) for size in CHUNKS if size < total}
    if rows <= MOST_LOOPS:
        strategies["looped rows"] = jacfunc.Looped("rows")
    if columns <= MOST_LOOPS:
        strategies["looped columns"] = jacfunc.Looped("columns")
    return strategies


def measure(device: torch.device, only: str = "") -> dict[str, Any]:
    """The body of the results file; ``only`` is part of the names of cases."""
    chosen = [(name, setup) for name, setup in cases() if only in name]
    every = track(chosen, "regret", console=console)
    results = [measured(name, setup(device), device) for name, setup in every]
    return {"summary": summary(results), "results": results}


def measured(name: str, problem: Problem, device: torch.device) -> dict[str, Any]:
    """Seconds of each strategy, and by which factor the choosers miss the best.

    Ratios are of rounds after those that showed which is best; the best itself is among them: who
    was the fastest before was lucky, too. ``planning`` is what auto's first call takes more than a
    later one, as a share of that.
    """
    by_hand, choosers = candidates(problem), {chooser: chooser for chooser in TARGETS}
    every = timed(problem, {**by_hand, **choosers}, WEEDING, device)
    seconds = {n: r.time.median for n, r in every.items() if r.ok and r.time}
    least = min(seconds[n] for n in by_hand if n in seconds)
    good = {n: s for n, s in by_hand.items() if seconds.get(n, math.inf) <= HOPELESS * least}
    able = {n: s for n, s in choosers.items() if n in seconds}
    again = timed(problem, {**good, **able}, EFFORT, device)
    seconds |= {n: r.time.median for n, r in again.items() if r.time}
    best = min(good, key=seconds.__getitem__)
    ratios = timed(problem, {BEST: good[best], AGAIN: good[best], **able}, EFFORT, device)
    return {
        "case": name,
        "best": best,
        "seconds": seconds,
        "regret": {n: r.ratio.median for n, r in ratios.items() if n != BEST and r.ratio},
        "planning": planning(problem, device) if seconds.get("auto", 0.0) >= MIDDLING else None,
        "failures": {n: r.status[:120] for n, r in every.items() if not r.ok},
    }


def timed(
    problem: Problem, strategies: Mapping[str, str | Strategy], effort: Effort, device: torch.device
) -> dict[str, Result]:
    """Every strategy in rounds, its answer compared with that of reverse mode before."""
    expected = optree.tree_leaves(problem.jacobian("reverse")())

    def check(answer: Any) -> float:
        for block, other in zip(optree.tree_leaves(answer), expected, strict=True):
            bound = 1e-4 * float(other.abs().max())
            torch.testing.assert_close(block, other, rtol=1e-3, atol=bound)
        return 0.0

    entries = []
    for name, strategy in strategies.items():
        way = Contestant(name, "", partial(Problem.jacobian, strategy=strategy), counted=False)
        entries.append(Entry(problem, way, check, effort.patience, device))
    return {result.contestant: result for result in measure_all(entries, effort, BEST)}


def planning(problem: Problem, device: torch.device) -> float:
    shares = []
    for _ in range(PLANNINGS):
        first, later = interleaved({"": problem.jacobian("auto")}, 2, device)[""]
        shares.append(first / later - 1)
    return statistics.median(shares)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By chooser: the share of cases within its target, the median and the worst regret."""
    by_chooser = {}
    for name, (bound, wanted) in TARGETS.items():
        regrets = [result["regret"][name] for result in results if name in result["regret"]]
        by_chooser[name] = {
            "target": bound,
            "wanted": wanted,
            "within": sum(r <= bound for r in regrets) / len(regrets),
            "median": statistics.median(regrets),
            "worst": max(regrets),
        }
    return by_chooser


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A row a case; what misses a target stands out."""
    results = body["results"]
    lines = [
        f"{name}: within {s['target']:.2f}× of the best in {s['within']:.0%} of {len(results)} "
        f"cases (wanted {s['wanted']:.0%}), median {s['median']:.2f}×, worst {s['worst']:.2f}×"
        for name, s in body["summary"].items()
    ]
    noise = [abs(result["regret"][AGAIN] - 1) for result in results]
    lines.append(
        f"noise: the best is within {statistics.median(noise):.1%} of itself (median), "
        f"at most {max(noise):.1%}"
    )
    if shares := [result["planning"] for result in results if result["planning"] is not None]:
        lines.append(
            f"planning: {statistics.median(shares):.1%} of a call (median), at most "
            f"{max(shares):.1%}, in the {len(shares)} cases of {MIDDLING * 1e3:.0f} ms or more"
        )
    title = "Time ÷ that of the best strategy picked by hand"
    shown = table(title, "\n".join(lines), "case", "best by hand", "time", *TARGETS, words=2)
    for result in results:
        best, regret = result["best"], result["regret"]
        cells = [f"{regret[n]:.2f}" if n in regret else "refused" for n in TARGETS]
        is_missed = any(regret.get(n, bound + 1) > bound for n, (bound, _) in TARGETS.items())
        style = "red" if is_missed else ""
        add(shown, result["case"], best, in_seconds(result["seconds"][best]), *cells, style=style)
    return [shown]


def says(body: Mapping[str, Any]) -> str:
    """How near `auto` and `autotune` come to the best strategy picked by hand."""
    cases = len(body["results"])
    auto, autotune = (
        (
            f"{part['target']:.2f}",
            f"in {round(part['within'] * cases)} of {cases} cases "
            f"(median {part['median']:.2f}, worst {part['worst']:.2f})",
        )
        for part in (body["summary"][name] for name in TARGETS)
    )
    return (
        f'The time that `"auto"` takes is at most {auto[0]} times that of the best strategy picked '
        f'by hand {auto[1]}; that of `"autotune"` is at most {autotune[0]} {autotune[1]} '
        "({source})."
    )
