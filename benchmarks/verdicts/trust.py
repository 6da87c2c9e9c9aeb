"""Can ``compare`` be trusted? The same code against itself, and against itself made slower."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from benchmarks.running.progress import Watch
from benchmarks.running.records import Run
from benchmarks.running.suite import Order, run_suite
from benchmarks.verdicts.comparing import SOUGHT, Change, compare

ONLY = "mlp 64, 16 →"
"""Cases of a few hundred microseconds to some ten milliseconds."""

PROCESSES = 7
WANTED = 0.95


@dataclass(frozen=True)
class Share:
    """Of how many pairs of results a comparison says what it should.

    Args:
        verdicts: of all of them.
    """

    what: str
    wanted: str
    verdicts: dict[str, int]

    @property
    def pairs(self) -> int:
        return sum(self.verdicts.values())

    @property
    def found(self) -> int:
        return self.verdicts.get(self.wanted, 0)

    @property
    def met(self) -> bool:
        return self.found >= WANTED * self.pairs


def measure(device: str, watch: Watch) -> list[Share]:
    """Three runs, one after the other; in the last jacfunc is slower by what must be found."""
    with tempfile.TemporaryDirectory() as directory:
        order = Order("full", device, Path(directory), only=ONLY, processes=PROCESSES)
        first = run_suite(order, watch)
        again = run_suite(order, watch)
        slowed = run_suite(replace(order, planted=1.0 + SOUGHT), watch)
    return [
        share("the same code", "equivalent", compare(first, again).changes),
        share(f"{SOUGHT:.0%} slower", "regressed", _of_ours(first, compare(first, slowed).changes)),
    ]


def _of_ours(run: Run, changes: Iterable[Change]) -> list[Change]:
    return [
        change
        for change in changes
        for result in run.cases[change.case]["results"]
        if result["contestant"] == change.contestant and result["family"] == "jacfunc"
    ]


def share(what: str, wanted: str, changes: Iterable[Change]) -> Share:
    """Who has no answer, or is what others are compared with, is no pair."""
    verdicts = Counter[str](c.verdict for c in changes if c.verdict not in ("fails", "baseline"))
    return Share(what, wanted, dict(verdicts))


def table(shares: Iterable[Share]) -> Table:
    """A row each for what should be found."""
    shown = Table(
        title="What compare says of two runs",
        caption=f"Wanted: {WANTED:.0%} or more.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("the second run is", "wanted", "pairs", "found", "all verdicts"):
        shown.add_column(heading)
    for each in shares:
        told = ", ".join(f"{count} {name}" for name, count in sorted(each.verdicts.items()))
        cells = each.what, each.wanted, str(each.pairs), f"{each.found / each.pairs:.1%}", told
        shown.add_row(*cells, style="green" if each.met else "red")
    return shown
