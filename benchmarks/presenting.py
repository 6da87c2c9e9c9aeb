"""What is shown and kept: a table a workload, a JSON file and one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.contestants import BASELINE
from benchmarks.environment import Environment
from benchmarks.measuring import Result, Spread

RESULTS = Path(__file__).parent / "results"
_UNITS = ("B", "KB", "MB", "GB")


def table(title: str, results: Sequence[Result]) -> Table:
    """Contestants of one workload; the fastest right answer is marked, failures say why below."""
    reasons = [f"{result.contestant}: {result.status}" for result in results if not result.ok]
    shown = Table(
        title=title,
        caption=Text("\n".join(reasons)),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("contestant", no_wrap=True)
    for heading in ("time × baseline", "time, ms", "rounds", "peak", "max error"):
        shown.add_column(heading, justify="right")
    best = winner(results)
    for result in results:
        name = result.contestant + (" (baseline)" if result.contestant == BASELINE else "")
        if not result.ok:
            shown.add_row(f"  {name}", result.status.partition(":")[0], style="red")
            continue
        is_best = result.contestant == best
        shown.add_row(
            f"★ {name}" if is_best else f"  {name}",
            spread(result.ratio),
            spread(result.time, 1e3),
            str(len(result.seconds)),
            size(result.peak_bytes),
            "-" if result.error is None else f"{result.error:.0e}",
            style="bold green" if is_best else "",
        )
    return shown


def winner(results: Sequence[Result]) -> str | None:
    """Name of the contestant with the least median time."""
    timed = [(r.time.median, r.contestant) for r in results if r.ok and r.time is not None]
    return min(timed)[1] if timed else None


def spread(value: Spread | None, scale: float = 1) -> str:
    """``median (low to high)``, the quartiles in brackets."""
    if value is None:
        return "-"
    median, low, high = (_short(x * scale) for x in (value.median, value.low, value.high))
    return f"{median} ({low}–{high})"


def size(count: int | None) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    if count is None:
        return "-"
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_UNITS[-1]}"


def _short(value: float) -> str:
    """Three digits, or two after the point where that is fewer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def write_json(path: Path, kind: str, where: Environment, body: Mapping[str, Any]) -> None:
    """One file a run: where it was made, and what came out."""
    record = {"kind": kind, "environment": where, **body}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def as_record(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as plain data, times by round included so that runs can be compared later."""
    return [
        {**asdict(result), "winner": winner(results) == result.contestant} for result in results
    ]
