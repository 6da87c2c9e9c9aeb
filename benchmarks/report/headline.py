"""The picture for the README: who wins at which shape, per-sample Jacobians, kernels."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.grids import drawn_crossover, drawn_overview
from benchmarks.report.grouping import crossovers, titled
from benchmarks.report.pictures import BRIGHT
from benchmarks.report.tables import machine
from benchmarks.running.records import Run
from benchmarks.verdicts.intervals import Record
from jacfunc.compare._drawing import as_svg, drawing

WIDTH, HEIGHT = 11.0, 4.2
PANELS = 3
ROWS = 6
"""Cases at most in a panel."""
BATCH = 64
PARAMS, KERNELS = "params", "ntk"
"""Questions with a panel each; where they were not asked, the first ones that were."""


def as_picture(suite: str, device: str, run: Run) -> str:
    """Standing alone, on white."""
    asked = dict.fromkeys(record["question"] for record in run.cases.values())
    maps = [group for name in asked for group in crossovers(run.of(name))][:1]
    names = [name for name in dict.fromkeys((PARAMS, KERNELS, *asked)) if name in asked]
    rows = [(name, many(list(run.of(name)))) for name in names][: PANELS - len(maps)]
    title = f"{machine(run)} ({device}, suite {suite})"
    with drawing(WIDTH, HEIGHT) as figure:
        figure.suptitle(title, fontsize=10)
        parts = figure.subfigures(1, max(1, len(maps) + len(rows)), squeeze=False).flat
        for group in maps:
            part = next(parts)
            drawn_crossover(part, part.subplots(), group, f"the fastest way: {titled(group)}")
        for name, records in rows:
            part = next(parts)
            panel = part.subplots()
            drawn_overview(part, panel, records)
            panel.set_title(f"{name}: time beside {records[0]['baseline']}")
        return as_svg(figure, BRIGHT, title)


def many(records: Sequence[Record]) -> list[Record]:
    """Those of many samples, where there are some."""
    large = [record for record in records if record["sizes"].get("batch") == BATCH]
    return (large or list(records))[:ROWS]
