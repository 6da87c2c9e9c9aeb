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

from benchmarks.report.tables import add, console, in_seconds, table
from benchmarks.studies.grid import candidates, cases
from jacfunc import Strategy
from jacfunc._measuring import Contestant, Effort, Entry, Result, interleaved
from jacfunc._measuring import measure as measure_all
from jacfunc.compare import Problem

# largest wanted regret, and the share of cases in which it must hold
TARGETS = {"auto": (1.10, 0.90), "autotune": (1.05, 0.95)}
# the best against itself: how far noise alone carries a ratio from 1
BEST, AGAIN = "best", "best again"
HOPELESS = 3.0  # a candidate that is slower than the best by this factor is not timed again
WEEDING = Effort(rounds=5, seconds=0.05, fewest=1, patience=1.0)
EFFORT = Effort(rounds=300, seconds=0.4, fewest=5, patience=60.0)
MIDDLING, PLANNINGS = 0.01, 5
"""Seconds of a call from which on what planning adds to the first one is looked at; how often."""


def measure(device: torch.device, only: str = "") -> dict[str, Any]:
    """The body of the results file; ``only`` is part of the names of cases."""
    every = track([case for case in cases() if only in case[0]], "regret", console=console)
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
    """The share of a later call that auto's first call takes longer."""
    pairs = (interleaved({0: problem.jacobian("auto")}, 2, device)[0] for _ in range(PLANNINGS))
    return statistics.median(first / later - 1 for first, later in pairs)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By chooser: the share of cases within its target, the median and the worst regret."""
    by_chooser = {}
    for name, (bound, wanted) in TARGETS.items():
        regrets = [result["regret"][name] for result in results if name in result["regret"]]
        within = sum(regret <= bound for regret in regrets) / len(regrets)
        middle, worst = statistics.median(regrets), max(regrets)
        part = {"target": bound, "wanted": wanted, "within": within}
        by_chooser[name] = part | {"median": middle, "worst": worst}
    return by_chooser


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A row a case; what misses a target stands out."""
    results, lines = body["results"], []
    for name, s in body["summary"].items():
        share = f"{s['within']:.0%} of {len(results)} cases (wanted {s['wanted']:.0%})"
        ends = f"median {s['median']:.2f}×, worst {s['worst']:.2f}×"
        lines.append(f"{name}: within {s['target']:.2f}× of the best in {share}, {ends}")
    noise = [abs(result["regret"][AGAIN] - 1) for result in results]
    planned = [result["planning"] for result in results if result["planning"] is not None]
    for what, shares in ("the best differs from itself", noise), ("planning adds", planned):
        if shares:
            ends = f"{statistics.median(shares):.1%} (median), at most {max(shares):.1%}"
            lines.append(f"{what} by {ends}, in {len(shares)} cases")
    title = "Time ÷ that of the best strategy picked by hand"
    shown = table(title, "\n".join(lines), "case", "best by hand", "time", *TARGETS, words=2)
    for result in results:
        best, regret = result["best"], result["regret"]
        cells = [f"{regret[n]:.2f}" if n in regret else "refused" for n in TARGETS]
        is_missed = any(regret.get(n, math.inf) > bound for n, (bound, _) in TARGETS.items())
        time, style = in_seconds(result["seconds"][best]), "red" if is_missed else ""
        add(shown, result["case"], best, time, *cells, style=style)
    return [shown]


def says(body: Mapping[str, Any]) -> str:
    """How near `auto` and `autotune` come to the best strategy picked by hand."""
    cases, times = len(body["results"]), " times that of the best strategy picked by hand"
    parts: list[str] = []
    for name in TARGETS:
        s = body["summary"][name]
        share = f"in {round(s['within'] * cases)} of {cases} cases"
        ends = f"(median {s['median']:.2f}, worst {s['worst']:.2f})"
        parts.append(f"{s['target']:.2f}{'' if parts else times} {share} {ends}")
    first = f'The time that `"auto"` takes is at most {parts[0]};'
    return f'{first} that of `"autotune"` is at most {parts[1]} ({{source}}).'
