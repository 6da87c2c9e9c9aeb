"""Pictures in rows and cells: who wins at which shape, and everyone beside the baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.report.grouping import sides, titled
from benchmarks.verdicts.intervals import Record, beside, number, verdict, winners
from jacfunc.compare._drawing import (
    INK,
    MUTED,
    PAPER,
    STYLES,
    as_svg,
    drawing,
    key,
    log_axis,
    marked,
)
from jacfunc.compare._pareto import HEIGHT, WIDTH

CELLS = tuple(f"#01012{n}" for n in range(8))
"""Colors to draw cells with, below text."""
LIGHT_CELLS: Mapping[str, str] = dict(
    zip(
        CELLS,
        ("#bfdcf4", "#fbd3b4", "#b5e6d4", "#f0cbe0", "#f2e9a8", "#d0d1f2", "#f3c4c4", "#dfe2e6"),
        strict=True,
    )
)
NEITHER = CELLS[-1]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Cell = tuple[str, str]
"""A color, and what is written on it."""


def crossover(records: Sequence[Record], theme: Mapping[str, str]) -> str:
    """Who is the fastest at which numbers of inputs and outputs."""
    with drawing(WIDTH, HEIGHT) as figure:
        letters = drawn_crossover(figure, figure.subplots(), records, titled(records))
        told = ", ".join(f"{letter}: {name}" for name, letter in letters.items())
        return as_svg(figure, theme, f"Winners by inputs and outputs, {titled(records)}. {told}")


def drawn_crossover(
    figure: Any, panel: Any, records: Sequence[Record], title: str
) -> dict[str, str]:
    """Letters by contestant, the most frequent winner first."""
    firsts = [names[0] for record in records if (names := winners(record))]
    letters = {name: LETTERS[n % 26] for n, (name, _) in enumerate(Counter(firsts).most_common())}
    colors = {name: CELLS[n % len(CELLS)] for n, name in enumerate(letters)}
    looks = [{**_square(colors[name])} for name in letters]
    key(figure, [f"{letter}  {name}" for name, letter in letters.items()], looks)

    def cell(record: Record) -> Cell:
        first, *ties = winners(record) or [""]
        if not first:
            return NEITHER, "none"
        lines = [letters[first]]
        if first == record["baseline"] or record["baseline"] in ties:
            lines.append("tie" if first != record["baseline"] else "1×")
        elif ratio := beside(record, first, record["baseline"]):
            lines.append(f"{number(1 / ratio.mid)}×")
        return colors[first], "\n".join([*lines, *([f"+{len(ties)}"] if ties else [])])

    _cells(panel, records, cell)
    panel.set_title(title)
    return letters


def directions(records: Sequence[Record], theme: Mapping[str, str]) -> str:
    """Where forward mode beats reverse mode and the reverse, by how much; or nothing."""
    names = [_way(records, word) for word in ("forward", "reverse")]
    if None in names:
        return ""
    forward, reverse = map(str, names)

    def cell(record: Record) -> Cell:
        ratio = beside(record, forward, reverse)
        if ratio is None:
            return NEITHER, "?"
        said = verdict(ratio)
        if said == "tie":
            return NEITHER, "tie"
        if said == "faster":
            return CELLS[1], f"fwd\n{number(1 / ratio.mid)}×"
        return CELLS[0], f"rev\n{number(ratio.mid)}×"

    with drawing(WIDTH, HEIGHT) as figure:
        told = [f"rev: {reverse}", f"fwd: {forward}", "tie"]
        key(figure, told, [_square(color) for color in (CELLS[0], CELLS[1], NEITHER)])
        panel = figure.subplots()
        _cells(panel, records, cell)
        panel.set_title(titled(records))
        said = f"Whether {forward} or {reverse} is faster, by inputs and outputs"
        return as_svg(figure, theme, f"{said}, {titled(records)}")


def _way(records: Sequence[Record], word: str) -> str | None:
    """The plainest contestant of jacfunc's with a word in its name."""
    found = (
        r["contestant"]
        for record in records
        for r in record["results"]
        if r["family"] == "jacfunc" and word in r["contestant"]
    )
    return min(found, key=len, default=None)


def _square(color: str) -> dict[str, Any]:
    look = {"marker": "s", "markersize": 9, "linestyle": "", "markerfacecolor": color}
    return {**look, "color": MUTED, "markeredgewidth": 0.6}


def _cells(panel: Any, records: Sequence[Record], cell: Callable[[Record], Cell]) -> None:
    from matplotlib.patches import Rectangle

    inputs, outputs = sides(records)
    for record in records:
        x = inputs.index(record["sizes"]["inputs"])
        y = outputs.index(record["sizes"]["outputs"])
        color, text = cell(record)
        box = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1.5)
        panel.add_patch(box)
        panel.text(x, y, text, ha="center", va="center", fontsize=8, color=INK, linespacing=1.05)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_xticks(range(len(inputs)), list(map(str, inputs)))
    panel.set_yticks(range(len(outputs)), list(map(str, outputs)))
    panel.set(xlabel="inputs", ylabel="outputs")
    panel.set(xlim=(-0.5, len(inputs) - 0.5), ylim=(-0.5, len(outputs) - 0.5))


def overview(title: str, records: Sequence[Record], theme: Mapping[str, str]) -> str:
    """A row a case: the fastest of every family, its time in units of the baseline's."""
    with drawing(WIDTH, 0.9 + 0.3 * len(records)) as figure:
        if not drawn_overview(figure, figure.subplots(), records):
            return ""
        return as_svg(figure, theme, f"Fastest of every family by case: {title}")


def drawn_overview(figure: Any, panel: Any, records: Sequence[Record]) -> bool:
    """False, with nothing drawn, where nobody has a time."""
    rows = [(record["case"], fastest(record)) for record in records]
    ratios = [ratio for _, found in rows for _, ratio in found.values()]
    if not ratios:
        return False
    families = [family for family in STYLES if any(family in found for _, found in rows)]
    key(figure, families, [marked(family) for family in families])
    log_axis(panel.xaxis, [1.0, *ratios], lambda ratio: f"{ratio:g}×", 6)
    panel.set(ylim=(len(rows) - 0.5, -0.75), yticks=[])
    panel.set_xlabel("time ÷ that of the baseline")
    panel.axvline(1.0, color=MUTED, linewidth=0.8)
    for n, (name, found) in enumerate(rows):
        panel.annotate(
            name,
            (0.015, n - 0.32),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        )
        panel.hlines(n + 0.1, *_ends(found), color=MUTED, linewidth=0.6)
        for family, (_, ratio) in found.items():
            panel.plot(ratio, n + 0.1, **marked(family))
    return True


def _ends(found: Mapping[str, tuple[str, float]]) -> tuple[float, float]:
    ratios = [ratio for _, ratio in found.values()]
    return min(ratios, default=1.0), max(ratios, default=1.0)


def fastest(record: Record) -> dict[str, tuple[str, float]]:
    """By family, the fastest contestant and its time ÷ the baseline's."""
    found: dict[str, tuple[str, float]] = {}
    for r in record["results"]:
        if r["status"] != "ok" or not (
            ratio := beside(record, r["contestant"], record["baseline"])
        ):
            continue
        family = r["family"]
        if family not in found or ratio.mid < found[family][1]:
            found[family] = (r["contestant"], ratio.mid)
    return found
