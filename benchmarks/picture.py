"""One picture of a run: time against memory, a panel a workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from benchmarks.measuring import Result

_STYLES = {
    "jacfunc": ("#0072b2", "o"),
    "torch.func": ("#d55e00", "s"),
    "autograd.functional": ("#6b6b6b", "^"),
}


def draw(path: Path, title: str, results: Mapping[str, Sequence[Result]]) -> None:
    """Write the picture as SVG; only what was timed is drawn."""
    # text stays text and ids are fixed: small files, and a diff shows what moved
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jacfunc", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2 * ((len(results) + 1) // 2)), layout="constrained")
        # pyplot would keep global state; this canvas can measure text, which the labels need
        FigureCanvasAgg(figure)
        figure.suptitle(title)
        panels = figure.subplots((len(results) + 1) // 2, 2, squeeze=False).flat
        for panel, (name, of_workload) in zip(panels, results.items(), strict=False):
            _panel(panel, name, [r for r in of_workload if r.ok and r.time and r.peak_bytes])
        for panel in list(panels):
            panel.set_axis_off()
        figure.draw_without_rendering()
        for panel in figure.axes:
            _label(panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(panel: Any, name: str, results: Sequence[Result]) -> None:
    panel.set(title=name, xscale="log", yscale="log", xlabel="time, ms", ylabel="peak memory, MB")
    panel.grid(which="major", color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.2, y=0.2)
    for axis in (panel.xaxis, panel.yaxis):
        # most panels span little more than a decade, where powers of ten alone leave one tick
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    for result in results:
        if result.time is None or result.peak_bytes is None:
            continue
        color, marker = _STYLES.get(result.family, ("#009e73", "D"))
        x, y = result.time.median * 1e3, result.peak_bytes / 1e6
        panel.hlines(y, result.time.low * 1e3, result.time.high * 1e3, color=color, linewidth=1)
        panel.plot(x, y, marker, color=color, markersize=6, label=result.contestant)


def _label(panel: Any) -> None:
    """Write names beside their points, each in the nearest place that is still free."""
    points = [(line, line.get_xydata()[0]) for line in panel.get_lines()]
    centres = [panel.transData.transform(at) for _, at in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    for line, at in points:
        for place in _places():
            label, box = _write(panel, line, at, place)
            inside = panel.bbox.containsx(box.x0) and panel.bbox.containsx(box.x1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()
        else:
            # better over another label than without a name
            _write(panel, line, at, _places()[0])


def _write(panel: Any, line: Any, at: Any, place: tuple[float, float]) -> tuple[Any, Any]:
    """A label at an offset from its point, and the box of its text."""
    label = panel.annotate(
        line.get_label(),
        at,
        xytext=place,
        textcoords="offset points",
        ha="left" if place[0] > 0 else "right",
        va="center",
        color=line.get_color(),
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.5},
    )
    renderer = panel.figure.canvas.get_renderer()
    label.update_positions(renderer)
    # the annotation's own extent would take its line in
    return label, Text.get_window_extent(label, renderer)


def _places() -> list[tuple[float, float]]:
    """Offsets to try, the nearest first."""
    steps = [(8.0 + 6 * abs(k), 12.0 * k) for k in range(-8, 9)]
    places = [(side * across, up) for across, up in steps for side in (1, -1)]
    return sorted(places, key=lambda place: abs(place[0]) + abs(place[1]))
