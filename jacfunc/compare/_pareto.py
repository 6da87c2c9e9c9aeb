"""Time against memory as a picture, every point named beside it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._drawing import (
    LIGHT,
    MUTED,
    PAPER,
    as_svg,
    drawing,
    key,
    log_axis,
    marked,
    settle,
    style,
    width_of,
)

WIDTH, HEIGHT = 4.2, 3.4
_LABEL = 8.0
"""Points of type of a name."""
_ROOM = 3.0
"""Points of type between a name and the edge of the panel."""
_MOST_NAMED = 800.0
"""Points of type that all names together may take where they are to stand in the panel."""
_OVER_A_POINT = 1
_OVER_A_NAME = 100

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points of type."""


@dataclass(frozen=True)
class Point:
    """Median and quartiles of a time, and the peak beside it."""

    label: str
    family: str
    seconds: float
    low: float
    high: float
    peak_bytes: int


@dataclass(frozen=True)
class Place:
    """Where a name may stand, and what that would cost."""

    offset: Spot
    box: Box
    cost: float


def pareto_svg(title: str, points: Sequence[Point], theme: Mapping[str, str] = LIGHT) -> str:
    """The picture as SVG; the same points give the same bytes.

    Where the names do not fit beside their points, numbers stand there, and the names below.
    """
    said = f"Time against peak memory: {title}"
    names = [point.label for point in points]
    if sum(width_of(name, _LABEL) for name in names) < _MOST_NAMED:
        with drawing(WIDTH, HEIGHT) as figure:
            panel = _drawn(figure, title, points)
            places = arranged(panel, points, names)
            if covers_nothing(places):
                write(panel, points, names, places)
                return as_svg(figure, theme, said)
    ranked = sorted(points, key=lambda point: point.seconds)
    with drawing(WIDTH, HEIGHT) as figure:
        numbers = [str(n + 1) for n in range(len(ranked))]
        named = [f"{n}  {point.label}" for n, point in zip(numbers, ranked, strict=True)]
        key(figure, named, [marked(point.family) for point in ranked])
        panel = _drawn(figure, title, ranked)
        write(panel, ranked, numbers, arranged(panel, ranked, numbers))
        return as_svg(figure, theme, said)


def _drawn(figure: Any, title: str, points: Sequence[Point]) -> Any:
    panel = figure.subplots()
    panel.set_title(textwrap.fill(title, 46))
    draw_pareto(panel, points)
    settle(figure)
    return panel


def draw_pareto(panel: Any, points: Sequence[Point]) -> None:
    """Points, quartiles of their times, and the line along those that nobody beats at both.

    The names are written when the layout is settled: see :func:`arranged`.
    """
    panel.set(xlabel="time of a call", ylabel="peak memory")
    times = [time for point in points for time in (point.low, point.high)]
    log_axis(panel.xaxis, times, in_seconds, 5)
    log_axis(panel.yaxis, [p.peak_bytes for p in points], lambda b: in_bytes(int(b)), 6, base=2)
    best = _unbeaten(points)
    xs, ys = [point.seconds for point in best], [point.peak_bytes for point in best]
    panel.plot(xs, ys, "-", color=MUTED, linewidth=0.7, drawstyle="steps-post", zorder=1)
    for point in points:
        color, _ = style(point.family)
        panel.hlines(point.peak_bytes, point.low, point.high, color=color, linewidth=1)
        panel.plot(point.seconds, point.peak_bytes, **marked(point.family))


def _unbeaten(points: Sequence[Point]) -> list[Point]:
    """From the fastest on, each that takes less memory than all before; bounds answer nothing."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.peak_bytes)):
        if point.family != "bound" and (not best or point.peak_bytes < best[-1].peak_bytes):
            best.append(point)
    return best


def arranged(panel: Any, points: Sequence[Point], names: Sequence[str]) -> list[Place]:
    """Where the names may stand, as near to their points as the others let them."""
    left, bottom, right, top = (edge * 72 / panel.figure.dpi for edge in panel.bbox.extents)
    frame = (left + _ROOM, bottom + _ROOM, right - _ROOM, top - _ROOM)
    marks = [_marks(panel, point) for point in points]
    widths = [width_of(name, _LABEL) for name in names]
    middle = (left + right) / 2
    tries = []
    # those at the edges have the fewest places; where that order fails, another may do
    for worth in (lambda mark: -abs(mark[0] - middle), lambda mark: mark[3]):
        order = sorted(range(len(points)), key=lambda n: worth(marks[n]))
        tries.append(_in_order(order, marks, widths, frame))
        if covers_nothing(tries[-1]):
            break
    return min(tries, key=lambda places: sum(place.cost for place in places))


def covers_nothing(places: Sequence[Place]) -> bool:
    """Whether no name, and no line to one, goes over another."""
    return all(place.cost < _OVER_A_NAME for place in places)


def write(
    panel: Any, points: Sequence[Point], names: Sequence[str], places: Sequence[Place]
) -> None:
    """The names, with a line to whoever is further away."""
    for point, name, place in zip(points, names, places, strict=True):
        color, _ = style(point.family)
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
        panel.annotate(
            name,
            (point.seconds, point.peak_bytes),
            xytext=place.offset,
            textcoords="offset points",
            ha="left" if place.offset[0] > 0 else "right",
            va="center",
            color=color,
            fontsize=_LABEL,
            arrowprops=arrow if abs(place.offset[1]) >= 12 else None,
            # lines may go below a name, and do not cross it out
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.3, "alpha": 0.8},
        )


def _marks(panel: Any, point: Point) -> Box:
    """The centre of a point, and the ends of its quartiles, on the page."""
    scale = 72 / panel.figure.dpi
    x, y = panel.transData.transform((point.seconds, point.peak_bytes)) * scale
    low, high = (
        panel.transData.transform((end, point.peak_bytes))[0] * scale
        for end in (point.low, point.high)
    )
    return x, low, high, y


def _in_order(
    order: Sequence[int], marks: Sequence[Box], widths: Sequence[float], frame: Box
) -> list[Place]:
    """A place for each, one after the other."""
    spots = [(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, _, _, y in marks]
    bars = [(low, y - 1, high, y + 1) for _, low, high, y in marks]
    names: list[Box] = []
    places: dict[int, Place] = {}
    for n in order:
        x, low, high, y = marks[n]
        others = spots[:n] + spots[n + 1 :]
        found = Place((8.0, 0.0), (x, y, x + widths[n], y), 10 * _OVER_A_NAME)
        for offset, box in _candidates((x, y), (low, high), widths[n]):
            end = (x + offset[0], y + offset[1])
            if not _holds(frame, box) or any(_meet(box, o) for o in (*names, *spots, *bars)):
                continue
            # far away is worse than near, but better than over something
            cost = min(math.hypot(*offset) / 400, 0.99)
            cost += _OVER_A_NAME * any(_crosses((x, y), end, other) for other in names)
            if cost < found.cost:
                cost += _OVER_A_POINT * sum(_crosses((x, y), end, other) for other in others)
            found = min(found, Place(offset, box, cost), key=lambda place: place.cost)
            if found.cost < _OVER_A_POINT:
                break
        places[n] = found
        names.append(found.box)
    return [places[n] for n in range(len(marks))]


def _candidates(centre: Spot, bar: tuple[float, float], width: float) -> Iterator[tuple[Spot, Box]]:
    """Offsets, the nearest first; at the height of the point, beyond its quartiles."""
    x, y = centre
    for across, up in _OFFSETS:
        beyond = (bar[1] - x if across > 0 else bar[0] - x) if abs(up) < 6 else 0.0
        start = x + across + beyond
        left = start if across > 0 else start - width
        box = (left, y + up - 0.6 * _LABEL, left + width, y + up + 0.6 * _LABEL)
        yield (across + beyond, up), box


_OFFSETS = sorted(
    (
        (side * (8.0 + 0.4 * abs(up) + more), float(up))
        for up in range(-150, 151, 6)
        for more in (0, 20, 60)
        for side in (1, -1)
    ),
    key=lambda offset: math.hypot(*offset),
)


def _holds(frame: Box, box: Box) -> bool:
    across = frame[0] <= box[0] and box[2] <= frame[2]
    return across and frame[1] <= box[1] and box[3] <= frame[3]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(start: Spot, end: Spot, box: Box) -> bool:
    """Whether a line goes through a box: whether its stretches inside both pairs of edges meet."""
    enters, leaves = 0.0, 1.0
    for axis in (0, 1):
        way = end[axis] - start[axis]
        edges = (box[axis] - start[axis], box[axis + 2] - start[axis])
        if way == 0:
            if not edges[0] < 0 < edges[1]:
                return False
            continue
        first, last = sorted(edge / way for edge in edges)
        enters, leaves = max(enters, first), min(leaves, last)
    return enters < leaves
