"""The pictures of a question, each an SVG in a theme's colors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.grids import CELLS, LIGHT_CELLS
from benchmarks.verdicts.intervals import Record, exponent, slope
from jacfunc._units import in_bytes, in_counts, in_digits, in_seconds
from jacfunc.compare._drawing import (
    GRID,
    INK,
    LIGHT,
    MUTED,
    PAPER,
    STYLES,
    as_svg,
    drawing,
    key,
    log_axis,
    marked,
    style,
)
from jacfunc.compare._pareto import HEIGHT, WIDTH, Point, pareto_svg

Theme = Mapping[str, str]
DARK: Theme = {
    INK: "#e6e8eb",
    MUTED: "#a3a9b1",
    GRID: "#343a42",
    PAPER: "#15181c",
    **dict(
        zip(
            (color for color, _ in STYLES.values()),
            ("#6cb4f0", "#ff9d5c", "#b8b8b8", "#45cfa6", "#ec9ccb", "#dcbf45"),
            strict=True,
        )
    ),
    **dict(
        zip(
            CELLS,
            (
                "#1f4666",
                "#6b3a12",
                "#14503f",
                "#5c2f4d",
                "#565018",
                "#3d3f78",
                "#5e2a2a",
                "#3c4148",
            ),
            strict=True,
        )
    ),
}
BRIGHT: Theme = {**LIGHT, **LIGHT_CELLS}
NAMES = {color: f"--c{color[-2:]}" for color in BRIGHT}
PAGE: Theme = {color: f"var({name})" for color, name in NAMES.items()}
"""Colors as the page's variables: it says what they are in the light and in the dark."""

_FACTOR = 2
"""A forecast as near as this is a good one."""
_MARKERS = "osD^vPX<>*"
_DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


def pareto(record: Record, theme: Theme) -> str:
    """Time against memory in one case, or nothing where fewer than two have both."""
    points = [
        Point(r["contestant"], r["family"], *_spread(r["time"]), r["peak_bytes"])
        for r in record["results"]
        if r["status"] == "ok" and r["time"] and r["peak_bytes"]
    ]
    return pareto_svg(record["case"], points, theme) if len(points) > 1 else ""


def _spread(time: Mapping[str, float]) -> tuple[float, float, float]:
    return time["median"], time["low"], time["high"]


def scaling(title: str, records: Sequence[Record], theme: Theme) -> str:
    """Times along an axis, smallest first; dotted, what the counted work says."""
    axis = records[0]["axis"]
    sizes = [record["sizes"][axis] for record in records]
    lines = _lines(records, axis)
    if not lines:
        return ""
    with drawing(WIDTH, HEIGHT) as figure:
        key(figure, [told for told, _, _, _ in lines], [look for _, look, _, _ in lines])
        panel = figure.subplots()
        panel.set(title=title, xlabel=axis, ylabel="time of a call")
        are_powers = all(size & (size - 1) == 0 for size in sizes)
        words, base = (in_digits, 2) if are_powers else (in_counts, 10)
        log_axis(panel.xaxis, sizes, lambda size: words(round(size)), 6, base)
        log_axis(panel.yaxis, [t for _, _, m, _ in lines for t in m.values()], in_seconds, 7)
        for _, look, measured, counted in lines:
            panel.plot(list(measured), list(measured.values()), **look)
            panel.plot(list(counted), list(counted.values()), ":", color=look["color"], lw=1.2)
        return as_svg(figure, theme, f"Time against {axis}: {title}")


Line = tuple[str, dict[str, Any], dict[int, float], dict[int, float]]


def _lines(records: Sequence[Record], axis: str) -> list[Line]:
    """Of everyone with two sizes: what is told, how it looks, times, and the work as time."""
    found: list[Line] = []
    seen: dict[str, int] = {}
    for name, family in _contestants(records).items():
        ok = {record["sizes"][axis]: r for record in records if (r := _timed(record, name))}
        times = {size: r["time"]["median"] for size, r in ok.items()}
        if len(times) < 2:
            continue
        works = {size: r["work"] for size, r in ok.items() if r["work"]}
        grows = exponent(records, name, axis)
        told = name if grows is None else f"{name}: {axis}^{grows:.2f}"
        if len(works) > 1:
            told += f", counted {axis}^{slope(list(works), list(works.values())):.2f}"
        # the largest size is where the work, not the calls, takes the time
        unit = times[max(works)] / works[max(works)] if works else 0.0
        turn = seen[family] = seen.get(family, -1) + 1
        color, marker = style(family)
        dash = _DASHES[turn % len(_DASHES)]
        fill = PAPER if turn % 2 else color
        look = {"color": color, "marker": marker, "markersize": 5, "linestyle": dash}
        counted = {size: work * unit for size, work in works.items()}
        found.append((told, {**look, "markerfacecolor": fill, "linewidth": 1.2}, times, counted))
    return found


def _contestants(records: Sequence[Record]) -> dict[str, str]:
    """Families by name, in the order of the tables."""
    return {r["contestant"]: r["family"] for record in records for r in record["results"]}


def _timed(record: Record, name: str) -> Mapping[str, Any] | None:
    for r in record["results"]:
        if r["contestant"] == name and r["status"] == "ok" and r["time"]:
            return dict(r)
    return None


def forecasts(title: str, records: Sequence[Record], of: str, theme: Theme) -> str:
    """What was expected against what was measured; ``of`` is ``seconds`` or ``peak_bytes``."""
    found = foretold(records, of)
    if not found:
        return ""
    told = f"{near(found)} of {len(found)} within a factor of {_FACTOR}"
    everything = [value for _, *pair in found for value in pair]
    words = in_seconds if of == "seconds" else lambda count: in_bytes(int(count))
    names = list(dict.fromkeys(name for name, _, _ in found))
    color, _ = style("jacfunc")
    looks = [
        {**marked("jacfunc"), "marker": _MARKERS[n % len(_MARKERS)], "markerfacecolor": "none"}
        for n in range(len(names))
    ]
    with drawing(WIDTH, HEIGHT) as figure:
        key(figure, names, looks)
        panel = figure.subplots()
        what = "time" if of == "seconds" else "peak memory"
        panel.set(title=f"{title}{told}", xlabel=f"measured {what}", ylabel=f"forecast {what}")
        for axis in (panel.xaxis, panel.yaxis):
            log_axis(axis, everything, words, 5, 10 if of == "seconds" else 2)
        ends = list(panel.get_xlim())
        below, above = [end / _FACTOR for end in ends], [end * _FACTOR for end in ends]
        panel.fill_between(ends, below, above, color=GRID, alpha=0.6, linewidth=0)
        panel.plot(ends, ends, "-", color=MUTED, linewidth=0.8)
        for name, look in zip(names, looks, strict=True):
            pairs = [(real, said) for who, said, real in found if who == name]
            panel.plot(*zip(*pairs, strict=True), **{**look, "color": color, "markersize": 5})
        return as_svg(figure, theme, f"Forecast against measured {what}: {title}{told}")


def foretold(records: Sequence[Record], of: str) -> list[tuple[str, float, float]]:
    """Who, what was forecast, what was measured; only where there are both."""
    found = []
    for record in records:
        for r in record["results"]:
            time = r["time"]["median"] if r["time"] else None
            real = time if of == "seconds" else r["peak_bytes"]
            said = (r["forecast"] or {}).get(of)
            if r["status"] == "ok" and said and real:
                found.append((r["contestant"], said, real))
    return found


def near(found: Sequence[tuple[str, float, float]]) -> int:
    """How many forecasts are within a factor of two."""
    return sum(1 / _FACTOR <= said / real <= _FACTOR for _, said, real in found)


def errors(records: Sequence[Record], theme: Theme) -> str:
    """Largest errors, a row a contestant and a mark a case; hollow in float64."""
    rows = [
        (name, family, _errors_of(records, name)) for name, family in _contestants(records).items()
    ]
    rows = [row for row in rows if row[2]]
    some = [error for _, _, found in rows for error, _ in found if error > 0]
    if not some:
        return ""
    edge = min(some) / 3
    with drawing(WIDTH, 0.7 + 0.29 * len(rows)) as figure:
        panel = figure.subplots()
        panel.set(xlabel="largest error ÷ largest entry", ylim=(len(rows) - 0.6, -0.7), yticks=[])
        log_axis(panel.xaxis, [edge, *some], lambda error: f"{error:.0e}", 6)
        for n, (name, family, found) in enumerate(rows):
            color, _ = style(family)
            panel.text(0.01, n - 0.3, name, color=color, fontsize=8, transform=_rows(panel))
            for error, dtype in found:
                fill = "none" if dtype == "float64" else color
                look = {**marked(family), "markersize": 5, "markerfacecolor": fill}
                panel.plot(max(error, edge), n, **look)
        return as_svg(figure, theme, "Largest error of every answer against float64")


def _errors_of(records: Sequence[Record], name: str) -> list[tuple[float, str]]:
    return [
        (r["error"], record["dtype"])
        for record in records
        for r in record["results"]
        if r["contestant"] == name and r["status"] == "ok" and r["error"] is not None
    ]


def _rows(panel: Any) -> Any:
    """Across the panel by share of its width, down it by rows."""
    from matplotlib.transforms import blended_transform_factory

    return blended_transform_factory(panel.transAxes, panel.transData)
