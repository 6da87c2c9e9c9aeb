"""What the commands of their own found: a few lines of each file that is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.tables import Table, spread
from jacfunc._units import in_bytes

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """A heading, a sentence, a table, and the file where the rest is."""

    title: str
    says: str
    table: Table
    path: Path


def summaries(folder: Path) -> Iterator[Summary]:
    """Of the files that are there, the CPU's first."""
    for kind, (title, summarize) in KINDS.items():
        for device in ("cpu", "cuda"):
            path = folder / f"{kind}-{device}.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                says, table = summarize(found)
                where = found["environment"]
                at = f"{where['device_name']}, {where['date'][:10]}, commit {where['commit']}"
                yield Summary(title, f"{says} ({at}.)", table, path)


def regret(found: Found) -> tuple[str, Table]:
    """How near the choosers come."""
    table = Table(("chooser", "within", "wanted", "found", "median", "worst"))
    for name, part in found["summary"].items():
        table.add(
            name,
            f"{part['target']:.2f}× of the best",
            f"{part['wanted']:.0%} of cases",
            f"{part['within']:.1%}",
            f"{part['median']:.2f}×",
            f"{part['worst']:.2f}×",
            mark="" if part["within"] >= part["wanted"] else "missed",
        )
    count = len(found["results"])
    return f"Time beside that of the best strategy picked by hand, in {count} cases.", table


def budget(found: Found) -> tuple[str, Table]:
    """What keeping to a budget costs."""
    table = Table(("case", "unchunked", "budget", "taken", "time ÷ best fixed chunk"))
    for case in found["results"]:
        sizes = (in_bytes(case[name]) for name in ("unchunked", "budget", "taken"))
        broken = case["taken"] > case["budget"] or case["ratio"] > found["target"]
        table.add(case["case"], *sizes, f"{case['ratio']:.2f}", mark="missed" if broken else "")
    return f"Peak and time under a memory budget; wanted: at most {found['target']:g}×.", table


def overhead(found: Found) -> tuple[str, Table]:
    """The least, the middle and the most by level."""
    table = Table(("level", "pairs", "fastest", "slowest", "wanted", "pairs above"))
    for level, target in found["targets"].items():
        pairs = [pair for pair in found["results"] if pair["level"] == level]
        ends = sorted(pairs, key=lambda pair: float(pair["ratio"]["median"]))
        above = sum(pair["ratio"]["median"] > target for pair in pairs)
        table.add(
            level,
            str(len(pairs)),
            *(f"{spread(pair['ratio'])}, {_shape(pair)}" for pair in (ends[0], ends[-1])),
            f"≤ {target:.2f}",
            str(above),
            mark="missed" if above else "",
        )
    says = f"jacfunc.jacrev ÷ torch.func.jacrev on perceptrons of width {found['width']}"
    return f"{says}, medians (quartiles) of {found['rounds']} rounds.", table


def _shape(pair: Found) -> str:
    return f"{pair['inputs']} → {pair['outputs']}"


KINDS: Mapping[str, tuple[str, Callable[[Found], tuple[str, Table]]]] = {
    "regret": ("What auto and autotune miss", regret),
    "budget": ("Jacobians under a memory budget", budget),
    "overhead": ("Overhead on small functions", overhead),
}
