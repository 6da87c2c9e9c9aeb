"""Tables for the terminal, and the same tables as HTML."""

from collections.abc import Collection, Mapping, Sequence
from html import escape as escaped
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.running.records import Record
from benchmarks.verdicts.comparing import Comparison, Verdict
from benchmarks.verdicts.intervals import BOUND, beside, number, rounds_of, winners
from jacfunc._units import UNKNOWN, in_bytes, in_seconds

LOG_WIDTH = 140  # a log has no width of its own, and the usual 80 columns break the tables
NOTHING = "–"
MARKS = "★ the fastest in PyTorch; = ties: within 5 %, or not told apart by the rounds there are."

CLASSES = {"red": "bad", "bold green": "best", "green": "good"}

console = Console()
if not console.is_terminal:
    console = Console(width=LOG_WIDTH)


def table(title: str, caption: str, *heads: str, words: int = 1) -> Table:
    """A table without rows; what stands behind the first columns, of words, is to the right."""
    shown = Table(title=Text(title), caption=Text(caption))
    shown.title_justify = shown.caption_justify = "left"
    for place, head in enumerate(heads):
        shown.add_column(head, justify="left" if place < words else "right")
    return shown


def add(shown: Table, *cells: str, style: str = "") -> None:
    """A row of plain text, whatever signs are in it."""
    shown.add_row(*map(Text, cells), style=style)


def as_html(shown: Table) -> str:
    """The headings and rows of a table, which scrolls by itself where the page is narrow."""
    kinds = ["number" if column.justify == "right" else "" for column in shown.columns]
    heads = (in_tag("th", escaped(str(column.header))) for column in shown.columns)
    lines = [in_tag("tr", "".join(heads))]
    cells = zip(*(column.cells for column in shown.columns), strict=True)
    for row, plain in zip(shown.rows, cells, strict=True):
        pairs = zip(plain, kinds, strict=True)
        line = "".join(in_tag("td", escaped(str(cell)), kind) for cell, kind in pairs)
        lines.append(in_tag("tr", line, CLASSES.get(str(row.style), "")))
    return in_tag("div", in_tag("table", "\n".join(lines)), "wide")


def in_tag(tag: str, content: str, kind: str = "") -> str:
    """Content, which is HTML, in a tag of a class."""
    return f"<{tag} class={kind}>{content}</{tag}>" if kind else f"<{tag}>{content}</{tag}>"


def said(plain: str) -> str:
    """A paragraph of plain text."""
    return in_tag("p", escaped(plain))


def spread(values: Mapping[str, float] | None) -> str:
    """``median (low–high)``."""
    if values is None:
        return NOTHING
    median, low, high = (number(values[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def of_case(record: Record) -> Table:
    """Contestants of a case: winners are marked, whoever failed stays with the reason."""
    heads = ("contestant", "time ÷ baseline", "time", "rounds", "peak", "error", "forecast")
    failed = [result for result in record["results"] if result["status"] != "ok"]
    lines = [f"{result['contestant']}: {result['status']}" for result in failed]
    lines += [" ".join(of_target(target)) for target in record["targets"]]
    shown = table(f"{record['question']}: {record['case']}", "\n".join(lines), *heads)
    signs = marks(record)
    for result in record["results"]:
        name = result["contestant"]
        sign, is_baseline = signs.get(name, " "), name == record["baseline"]
        label = f"{sign} {name}{' (baseline)' if is_baseline else ''}"
        if result["status"] == "ok":
            style = {"★": "bold green", "=": "green"}.get(sign, "")
            add(
                shown,
                label,
                *_cells(record, result),
                style="dim" if result["family"] == BOUND else style,
            )
        else:
            add(shown, label, result["status"].partition(":")[0], *[""] * 5, style="red")
    return shown


def marks(record: Record) -> dict[str, str]:
    """A sign for the fastest, and for whoever ties with it."""
    return {name: "=" if n else "★" for n, name in enumerate(winners(record))}


def _cells(record: Record, result: Record) -> tuple[str, ...]:
    error, forecast = result["error"], result["forecast"] or {}
    parts = (in_seconds(forecast.get("seconds")), in_bytes(forecast.get("peak_bytes")))
    return (
        spread(result["ratio"]),
        in_seconds(result["time"] and result["time"]["median"]),
        str(len(rounds_of(record, result["contestant"]))),
        in_bytes(result["peak_bytes"]),
        NOTHING if error is None else f"{error:.0e}",
        ", ".join(part for part in parts if part != UNKNOWN) or NOTHING,
    )


def of_target(target: Mapping[str, Any]) -> tuple[str, ...]:
    """Who, in what, what was wanted, what was found, and whether it is met."""
    value = "nothing" if target["found"] is None else number(target["found"])
    said = {True: "met", False: "missed", None: "not decided here"}[target["met"]]
    what, wanted = f"{target['of']} {target['what']}:", f"wanted {target['wanted']},"
    return what, wanted, f"found {value}:", said


def of_targets(records: Collection[Record]) -> Table:
    """A row a target; what is missed stands out."""
    shown = table("", "", "case", "target", "wanted", "found", "", words=5)
    several = len({record["question"] for record in records}) > 1
    for record in records:
        for target in record["targets"]:
            style = "red" if target["met"] is False else ""
            case = f"{record['question']}: {record['case']}" if several else record["case"]
            add(shown, case, *of_target(target), style=style)
    return shown


def of_ratios(records: Sequence[Record]) -> Table:
    """Times in units of the baseline's: a row a case, a column a contestant."""
    names = dict.fromkeys(r["contestant"] for record in records for r in record["results"])
    shown = table("", MARKS, "case", *names)
    for record in records:
        results, signs = {r["contestant"]: r for r in record["results"]}, marks(record)
        cells = []
        for name in names:
            ratio = beside(record, name, record["baseline"])
            cell = f"{signs.get(name, '')} {number(ratio.mid) if ratio else NOTHING}".strip()
            status = results[name]["status"] if name in results else ":"
            cells.append(cell if status == "ok" else status.partition(":")[0])
        add(shown, record["case"], *cells)
    return shown


STYLES: Mapping[Verdict, str] = {
    "regressed": "red",
    "broke": "bold red",
    "inconclusive": "yellow",
    "improved": "green",
    "mended": "green",
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
            text = " → ".join(dict.fromkeys(change.statuses))
            if (i := change.interval) is not None:
                text = f"{i.mid:.2f} ({i.low:.2f}–{i.high:.2f})"
            cells = change.case, change.contestant, change.verdict, text
            add(shown, *cells, style=STYLES.get(change.verdict, ""))
    return shown
