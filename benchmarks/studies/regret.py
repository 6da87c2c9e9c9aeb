"""How much slower than the best strategy is what `auto` and `autotune` choose? A row a case."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from benchmarks.studies.grid import Case, Problem
from jacfunc._measuring.clock import interleaved, seconds
from jacfunc._trees.tree import flatten

Run = Callable[[], Any]

CHOOSERS = ("auto", "autotune")
TARGETS = {"auto": (1.10, 0.90), "autotune": (1.05, 0.95)}
"""Largest wanted regret, and the share of cases in which it must hold."""

AGAIN = "best again"
"""The best against itself: how far noise alone carries a ratio from 1."""

HOPELESS = 3.0
"""A candidate that is slower than the best by this factor is not timed again."""

ROUNDS, SECONDS = 300, 1.2
"""At most, for all contestants of a case together."""

MIDDLING, PLANNINGS = 0.01, 5
"""Seconds of a call from which on what planning adds to the first one is looked at; how often."""


@dataclass(frozen=True)
class Regret:
    """One case: median seconds of each strategy, and by which factor the choosers miss the best.

    Ratios are of rounds after those that showed which is best; the best itself is among them.
    ``planning`` is what auto's first call takes more than a later one, as a share of that.
    """

    case: str
    best: str
    seconds: Mapping[str, float]
    regret: Mapping[str, float]
    planning: float | None
    failures: Mapping[str, str]


def measure(case: Case, device: torch.device) -> Regret:
    """Hand-picked strategies are weeded out by one call each, the rest is timed in rounds."""
    problem, cuda = case.problem(device), device.type == "cuda"
    runs, first, failures = _first_calls(problem, cuda)
    by_hand = [name for name in runs if name not in CHOOSERS]
    least = min(first[name] for name in by_hand)
    running = {n: r for n, r in runs.items() if n in CHOOSERS or first[n] <= HOPELESS * least}
    rounds = max(5, min(ROUNDS, int(SECONDS / sum(first[name] for name in running))))
    times = interleaved(running, rounds, cuda)
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min((name for name in by_hand if name in medians), key=medians.__getitem__)
    choosers = {name: running[name] for name in CHOOSERS if name in running}
    regret = _against(running[best], choosers, rounds, cuda)
    planning = _planning(problem, cuda) if medians.get("auto", 0.0) >= MIDDLING else None
    return Regret(case.name, best, {**first, **medians}, regret, planning, failures)


def _against(best: Run, choosers: Mapping[str, Run], rounds: int, cuda: bool) -> dict[str, float]:
    """In rounds of their own: whoever was fastest before was lucky, too."""
    times = interleaved({"best": best, AGAIN: best, **choosers}, 2 * rounds, cuda)
    return {
        name: statistics.median(a / b for a, b in zip(times[name], times["best"], strict=True))
        for name in (AGAIN, *choosers)
    }


def _planning(problem: Problem, cuda: bool) -> float:
    shares = []
    for _ in range(PLANNINGS):
        run = problem.derive("auto")
        first, later = seconds(run, cuda), seconds(run, cuda)
        shares.append(first / later - 1)
    return statistics.median(shares)


def _first_calls(
    problem: Problem, cuda: bool
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """What runs, how long a second call takes (a first, where that is hopeless), what fails."""
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    failures: dict[str, str] = {}
    answer = None
    for name, strategy in {**problem.candidates(), **{name: name for name in CHOOSERS}}.items():
        try:
            run = problem.derive(strategy)
            first[name] = seconds(run, cuda)
            if name in CHOOSERS or first[name] < 20 * min(first.values()):
                given = run()
                answer = given if answer is None else answer
                _assert_equal(given, answer)
                first[name] = seconds(run, cuda)
        except Exception as error:  # a refusal is a result too
            failures[name] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        else:
            runs[name] = run
    return runs, first, failures


def _assert_equal(given: Any, expected: Any) -> None:
    for mine, theirs in zip(flatten(given)[0], flatten(expected)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def summary(results: Sequence[Regret]) -> dict[str, dict[str, float]]:
    """By chooser: the share of cases within its target, the median and the worst regret."""
    found = {}
    for name, (bound, wanted) in TARGETS.items():
        regrets = [result.regret[name] for result in results if name in result.regret]
        found[name] = {
            "target": bound,
            "wanted": wanted,
            "within": sum(r <= bound for r in regrets) / len(regrets),
            "median": statistics.median(regrets),
            "worst": max(regrets),
        }
    return found


def table(results: Sequence[Regret]) -> Table:
    """A row a case; what misses its target stands out."""
    lines = [
        f"{name}: within {s['target']:.2f}× of the best in {s['within']:.0%} of {len(results)} "
        f"cases (wanted {s['wanted']:.0%}), median {s['median']:.2f}×, worst {s['worst']:.2f}×"
        for name, s in summary(results).items()
    ]
    noise = [abs(result.regret[AGAIN] - 1) for result in results]
    lines.append(
        f"noise: the best is within {statistics.median(noise):.1%} of itself (median), "
        f"at most {max(noise):.1%}"
    )
    shares = [result.planning for result in results if result.planning is not None]
    if shares:
        lines.append(
            f"planning: {statistics.median(shares):.1%} of a call (median), at most "
            f"{max(shares):.1%}, in the {len(shares)} cases of {MIDDLING * 1e3:.0f} ms or more"
        )
    shown = Table(
        title="Time ÷ that of the best strategy picked by hand",
        caption="\n".join(lines),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("case", no_wrap=True)
    shown.add_column("best by hand")
    for heading in ("ms", *CHOOSERS):
        shown.add_column(heading, justify="right")
    for result in results:
        cells = [_cell(name, result) for name in CHOOSERS]
        shown.add_row(result.case, result.best, f"{result.seconds[result.best] * 1e3:.3g}", *cells)
    return shown


def _cell(name: str, result: Regret) -> str:
    if name not in result.regret:
        return f"[red]{result.failures.get(name, '?')[:30]}[/]"
    regret = result.regret[name]
    return f"[red]{regret:.2f}[/]" if regret > TARGETS[name][0] else f"{regret:.2f}"
