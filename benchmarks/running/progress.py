"""What the terminal shows: how far a run has come, and a table for every case that is finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from benchmarks.running.environment import Environment
from benchmarks.running.records import Record, replace
from benchmarks.verdicts.intervals import BOUND, counted_rounds, winners
from jacfunc._measuring.results import Spread, spread
from jacfunc._units import in_bytes, in_seconds

LOG_WIDTH = 140
"""A log has no width of its own, and the usual 80 columns break the tables."""

console = Console()
if not console.is_terminal:
    console = Console(width=LOG_WIDTH)


# --- tables ---


def table(record: Record) -> Table:
    """Contestants of a case; the fastest and whoever ties with it are marked."""
    shown = Table(
        title=f"{record['question']}: {record['case']}",
        caption=_below(record),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("contestant", no_wrap=True)
    columns = _columns(record)
    for heading in columns:
        shown.add_column(heading, justify="right")
    won = winners(record)
    for result in record["results"]:
        name = result["contestant"]
        mark = "★" if name in won[:1] else "=" if name in won else " "
        label = f"{mark} {name}" + (" (baseline)" if name == record["baseline"] else "")
        if result["status"] != "ok":
            shown.add_row(label, result["status"].partition(":")[0], style="red")
            continue
        cells = (cell(result) for cell in columns.values())
        shown.add_row(label, *cells, style=_style(mark, result))
    return shown


def _columns(record: Record) -> dict[str, Callable[[Record], str]]:
    """By heading, what a result says there."""
    found: dict[str, Callable[[Record], str]] = {
        "time × baseline": lambda r: spread(Spread(**r["ratio"])) if r["ratio"] else "-",
        "time": lambda r: in_seconds(r["time"] and r["time"]["median"]),
        "rounds": lambda r: str(len(counted_rounds(r))),
        "peak": lambda r: "-" if r["peak_bytes"] is None else in_bytes(r["peak_bytes"]),
        "max error": lambda r: "-" if r["error"] is None else f"{r['error']:.0e}",
    }
    if any(result["forecast"] for result in record["results"]):
        found["forecast"] = _forecast
    return found


def _forecast(result: Record) -> str:
    said = result["forecast"]
    if said is None:
        return "-"
    parts = [in_seconds(said["seconds"])] if said["seconds"] is not None else []
    parts += [in_bytes(said["peak_bytes"])] if said["peak_bytes"] is not None else []
    return ", ".join(parts)


def _style(mark: str, result: Record) -> Style:
    if result["family"] == BOUND:
        return Style(dim=True)
    return Style(color="green", bold=mark == "★") if mark.strip() else Style()


def _below(record: Record) -> Text:
    """Why somebody failed, and what became of what was wanted."""
    failed = (r for r in record["results"] if r["status"] != "ok")
    lines = [Text(f"{r['contestant']}: {r['status']}", "red") for r in failed]
    for target in record["targets"]:
        found = "nothing" if target["found"] is None else f"{target['found']:.2f}"
        verdict = {True: "met", False: "missed", None: "cannot be said"}[target["met"]]
        told = f"{target['of']} {target['what']}: wanted {target['wanted']}, found {found}: "
        lines.append(Text(told + verdict, "red" if target["met"] is False else ""))
    return Text("\n").join(lines)


def write_json(path: Path, kind: str, where: Environment, body: Mapping[str, Any]) -> None:
    """One file a run: where it was made, and what came out."""
    record = {"kind": kind, "environment": where, **body}
    replace(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


# --- progress ---


class Watch:
    """Told by a run how far it has come; says so."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._pace = Pace({})
        self._task = progress.add_task("", total=None, left="", turn="")

    def begin(self, expected: Mapping[str, float]) -> None:
        """These cases, and the seconds that each may take."""
        self._pace = Pace(expected)
        self._progress.update(self._task, total=len(expected))

    def case(self, key: str) -> None:
        self._pace.start(key, time.monotonic())
        self._progress.update(self._task, description=key)
        self.contestant(None)

    def contestant(self, name: str | None) -> None:
        """Whose turn it is; None while the case is set up."""
        left = _clock(self._pace.left(time.monotonic()))
        self._progress.update(self._task, turn=name or "setup", left=f"{left} left")

    def finished(self, key: str, record: Record) -> None:
        self._pace.finish(key, time.monotonic())
        self._progress.advance(self._task)
        self._progress.console.print(table(record), "")


class Pace:
    """Time left, from what the finished cases took beside what was expected of them."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self._to_do = dict(expected)
        self._expected = self._taken = self._start = 0.0
        self._doing = ""

    def start(self, key: str, now: float) -> None:
        self._doing, self._start = key, now

    def finish(self, key: str, now: float) -> None:
        self._expected += self._to_do.pop(key)
        self._taken += now - self._start
        self._doing = ""

    def left(self, now: float) -> float:
        """Seconds; a case that takes longer than it should is expected to end now."""
        factor = self._taken / self._expected if self._expected else 1.0
        later = sum(weight for key, weight in self._to_do.items() if key != self._doing)
        rest = factor * self._to_do.get(self._doing, 0.0) - (now - self._start)
        return factor * later + max(rest, 0.0)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def progress() -> Progress:
    """A bar over cases, with the time that has passed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[turn]}"),
        console=console,
        refresh_per_second=2,
    )


@contextmanager
def watching() -> Iterator[Watch]:
    """A bar on the terminal while the suite runs."""
    with progress() as bar:
        yield Watch(bar)


def tracked(items: Sequence[Any], what: str) -> Iterator[Any]:
    """One by one, with a bar of how many are done."""
    with progress() as bar:
        task = bar.add_task(what, total=len(items), left="", turn="")
        for item in items:
            yield item
            bar.advance(task)
