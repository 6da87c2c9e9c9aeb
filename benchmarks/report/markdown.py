"""The report as Markdown, for reading on a forge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.older import Summary
from benchmarks.report.page import ABOUT, SIGNS, Links
from benchmarks.report.tables import Cell, Runs, Table
from benchmarks.verdicts.intervals import Record
from benchmarks.verdicts.sentences import sentence


def as_markdown(stem: Path, runs: Runs, raw: Links, older: Sequence[Summary]) -> str:
    """The whole file."""
    return "\n\n".join(_parts(stem, runs, raw, older)) + "\n"


def _parts(stem: Path, runs: Runs, raw: Links, older: Sequence[Summary]) -> Iterator[str]:
    yield f"# jacfunc: the {stem.name} benchmark"
    yield ABOUT
    yield f"![the headline]({stem.name}.svg)"
    data = ", ".join(f"[{path.name}]({path.name})" for path in raw.values())
    yield f"All pictures and tables: [{stem.name}.html]({stem.name}.html). Raw data: {data}."
    yield "## Environment and load"
    yield table(tables.environment(runs))
    yield "## Verdicts"
    yield table(tables.verdicts(runs))
    for name, asks in tables.questions(runs).items():
        yield f"## {text(name)}"
        yield text(asks)
        for device, run in runs.items():
            records = tables.of(run, name)
            yield f"### {device}"
            if not records:
                yield f"{tables.ABSENT.capitalize()}."
                continue
            yield text(sentence(records))
            baselines = ", ".join(dict.fromkeys(record["baseline"] for record in records))
            yield text(f"Time ÷ that of {baselines}. {tables.MARKS}")
            yield table(tables.ratios(records))
            failed = _failures(records)
            if failed.rows:
                yield table(failed)
    for found in older:
        yield f"## {found.title}"
        yield f"{text(found.says)} [{found.path.name}]({found.path.name})"
        yield table(found.table)


def _failures(records: Sequence[Record]) -> Table:
    shown = Table(("case", "who failed", "why"), words=(0, 1, 2))
    for record in records:
        for r in record["results"]:
            if r["status"] != "ok":
                shown.add(record["case"], r["contestant"], r["status"])
    return shown


def table(shown: Table) -> str:
    """Headings, a rule, rows."""
    rule = ["---" if n in shown.words else "---:" for n in range(len(shown.head))]
    rows = [[_cell(cell) for cell in row] for row in shown.rows]
    lines = [[text(head) or " " for head in shown.head], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    shown = SIGNS.get(cell.mark, "") + text(cell.text)
    return f"**{shown}**" if cell.mark == "wins" else shown


def text(plain: str) -> str:
    """With what Markdown would take for its own."""
    for sign in "\\|*_<>`[]":
        plain = plain.replace(sign, f"\\{sign}")
    return plain.replace("\n", " ")
