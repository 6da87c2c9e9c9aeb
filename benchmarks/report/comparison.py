"""The table of two runs compared."""

from collections.abc import Mapping

from rich.table import Table

from benchmarks.report.tables import add, table
from benchmarks.verdicts.comparing import Change, Comparison, Verdict

STYLES: Mapping[Verdict, str] = {
    "regressed": "red",
    "broke": "bold red",
    "improved": "green",
    "mended": "green",
    "inconclusive": "yellow",
}


def table_of(comparison: Comparison, everything: bool = False) -> Table:
    """What is not equivalent, or all of it, and how much there is of each verdict."""
    quiet = () if everything else ("equivalent", "fails", "baseline")
    lines = [", ".join(f"{count} {name}" for name, count in sorted(comparison.counts.items()))]
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        lines += [f"only in the {which}: {', '.join(names)}"] if names else []
    lines += [comparison.warning] if comparison.warning else []
    title = "Time beside the baseline, second run ÷ first"
    heads = ("case", "contestant", "verdict", "change (95 %)")
    shown = table(title, "\n".join(lines), *heads, words=3)
    for change in comparison.changes:
        if change.verdict not in quiet:
            cells = change.case, change.contestant, change.verdict, _cell(change)
            add(shown, *cells, style=STYLES.get(change.verdict, ""))
    return shown


def _cell(change: Change) -> str:
    if change.interval is not None:
        low, middle, high = change.interval.low, change.interval.mid, change.interval.high
        return f"{middle:.2f} ({low:.2f}–{high:.2f})"
    before, after = change.statuses
    return f"{before} → {after}" if before != after else before
