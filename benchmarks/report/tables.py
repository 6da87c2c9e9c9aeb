"""What the page and the Markdown both say, as rows of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.running.records import Run
from benchmarks.verdicts.intervals import Record, beside, counted_rounds, number, winners
from benchmarks.verdicts.sentences import sentence
from jacfunc._measuring.results import WARM_UP
from jacfunc._units import in_bytes, in_seconds

ABSENT = "not measured"
NOTHING = "–"
MARKS = "★ the fastest in PyTorch; = ties: within 5 %, or not told apart by the rounds there are."
Mark = Literal["", "wins", "ties", "failed", "missed"]


@dataclass(frozen=True)
class Cell:
    """Text, and what stands out about it."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """Headings, rows, and the columns of words, which stand to the left."""

    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    words: tuple[int, ...] = (0,)

    def add(self, *texts: str, mark: Mark = "") -> None:
        self.rows.append(tuple(Cell(text, mark) for text in texts))


Runs = Mapping[str, Run | None]
"""By device as it is written in headings; nothing where it was not measured."""


def questions(runs: Runs) -> dict[str, str]:
    """What each asks, in the order of the table."""
    return {
        record["question"]: record["asks"]
        for run in runs.values()
        if run is not None
        for record in run.cases.values()
    }


def of(run: Run | None, question: str) -> list[Record]:
    return [] if run is None else list(run.of(question))


# --- where ---


def environment(runs: Runs) -> Table:
    """Machine, versions and load, a column a device."""
    columns = [{} if run is None else _where(run) for run in runs.values()]
    shown = Table(("", *runs), words=tuple(range(1 + len(runs))))
    for name in dict.fromkeys(name for column in columns for name in column):
        shown.add(name, *(column.get(name, ABSENT) for column in columns))
    return shown


def _where(run: Run) -> dict[str, str]:
    where, cases = run.environment, list(run.cases.values())
    commits = dict.fromkeys(str(case.get("commit", where.get("commit"))) for case in cases)
    loads = [case["load"] for case in cases if case.get("load") is not None]
    before = where.get("load_before") or [NOTHING]
    during = f"{min(loads):.2f} to {max(loads):.2f}, as cases began" if loads else NOTHING
    return {
        "processor": f"{where.get('device_name')}, {where.get('cpus')} cores",
        "threads": str(where.get("threads")),
        "system": str(where.get("system")),
        "versions": ", ".join(
            f"{name} {where.get(name)}" for name in ("python", "torch", "jacfunc")
        ),
        "commit": ", ".join(commits),
        "date": str(where.get("date"))[:16].replace("T", " "),
        "load before (1, 5, 15 minutes)": ", ".join(map(str, before)),
        "load during": during,
        "measured": f"{len(cases)} cases in {sum(case.get('took') or 0 for case in cases):.0f} s",
        "rivals": ", ".join(f"{name} {v}" for name, v in run.rivals.items() if v) or "none",
        "rivals not installed": ", ".join(n for n, v in run.rivals.items() if not v) or "none",
    }


def machine(run: Run) -> str:
    """In a few words, for a title."""
    where = run.environment
    threads = where.get("threads")
    many = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{where.get('device_name')}, {many}, torch {where.get('torch')}"


# --- what came out ---


def verdicts(runs: Runs) -> Table:
    """A sentence a question and device, and how many targets are met."""
    shown = Table(
        ("question", *(f"{name}: {what}" for name in runs for what in ("verdict", "targets met"))),
        words=tuple(range(1 + 2 * len(runs))),
    )
    for question, asks in questions(runs).items():
        cells = [Cell(asks)]
        for run in runs.values():
            records = of(run, question)
            cells.append(Cell(sentence(records) if records else ABSENT))
            cells.append(met(records))
        shown.rows.append(tuple(cells))
    return shown


def met(records: Sequence[Record]) -> Cell:
    found = [target["met"] for record in records for target in record["targets"]]
    if not found:
        return Cell(NOTHING)
    known = [each for each in found if each is not None]
    unknown = f", {len(found) - len(known)} not decided here" if len(known) < len(found) else ""
    return Cell(f"{sum(known)} of {len(known)}{unknown}", "" if all(known) else "missed")


def targets(records: Iterable[Record]) -> Table:
    """What was wanted, what was found."""
    shown = Table(("case", "contestant", "figure", "wanted", "found", ""), words=(0, 1, 2))
    for record in records:
        for target in record["targets"]:
            met, found = target["met"], target["found"]
            said = {True: "met", False: "missed", None: "not decided here"}[met]
            figure = NOTHING if found is None else number(found)
            cells = (record["case"], target["of"], target["what"], target["wanted"], figure, said)
            shown.add(*cells, mark="missed" if met is False else "")
    return shown


def ratios(records: Sequence[Record]) -> Table:
    """Times in units of the baseline's: a row a case, a column a contestant."""
    names = list(dict.fromkeys(r["contestant"] for record in records for r in record["results"]))
    shown = Table(("case", *names))
    for record in records:
        by_name = {r["contestant"]: r for r in record["results"]}
        won = winners(record)
        cells = [_ratio(record, by_name.get(name), won) for name in names]
        shown.rows.append((Cell(record["case"]), *cells))
    return shown


def _ratio(record: Record, result: Mapping[str, Any] | None, won: Sequence[str]) -> Cell:
    if result is None:
        return Cell("")
    if result["status"] != "ok":
        return Cell(short(result["status"]), "failed")
    name = result["contestant"]
    found = beside(record, name, record["baseline"])
    return Cell(number(found.mid) if found else NOTHING, _mark(name, won))


def _mark(name: str, won: Sequence[str]) -> Mark:
    return "wins" if name in won[:1] else "ties" if name in won else ""


def short(status: str) -> str:
    """``wrong`` of ``wrong: relative error 3``."""
    return status.partition(":")[0]


def case(record: Record) -> Table:
    """Everyone who took part; whoever failed, with the reason."""
    heads = (
        "contestant",
        "status",
        "time ÷ baseline",
        "time",
        "rounds",
        "peak",
        "error",
        "forecast",
    )
    shown = Table(heads, words=(0, 1))
    won = winners(record)
    for r in record["results"]:
        name = r["contestant"]
        label = f"{name} (baseline)" if name == record["baseline"] else name
        mark = _mark(name, won)
        if r["status"] != "ok":
            shown.add(label, r["status"], *[NOTHING] * 6, mark="failed")
            continue
        said = {"wins": "fastest", "ties": "ties with it"}.get(mark, "ok")
        bound = " (a bound)" if r["family"] == "bound" else ""
        shown.add(label, said + bound, *_measured(r), mark=mark)
    return shown


def _measured(result: Mapping[str, Any]) -> tuple[str, ...]:
    time, ratio, peak = result["time"], result["ratio"], result["peak_bytes"]
    error, said = result["error"], result["forecast"]
    forecast = [NOTHING]
    if said is not None:
        parts = (in_seconds(said["seconds"]), in_bytes(said["peak_bytes"]))
        forecast = [part for part in parts if part != "?"] or forecast
    return (
        spread(ratio) if ratio else NOTHING,
        in_seconds(time["median"]) if time else NOTHING,
        _rounds(result),
        NOTHING if peak is None else in_bytes(peak),
        NOTHING if error is None else f"{error:.0e}",
        ", ".join(forecast),
    )


def spread(found: Mapping[str, float]) -> str:
    """``median (low–high)``."""
    median, low, high = (number(found[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _rounds(result: Mapping[str, Any]) -> str:
    found = counted_rounds(result)
    return "first call" if list(found) == [WARM_UP] else str(len(found))
