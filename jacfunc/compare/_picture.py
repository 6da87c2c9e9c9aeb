"""The picture of a comparison: time against peak memory; matplotlib is imported where it draws."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from jacfunc._measuring import Result
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._advice import front, timed

WIDTH, HEIGHT, LINE = 5.0, 3.6, 0.17
"""Inches: of the picture without its key, and of a line of the key."""

MARKS = {"jacfunc": ("o", "#0b63a5"), "torch.func": ("s", "#b54700")}
"""Marker and color by family; whoever cannot tell the colors apart has the shapes."""


PLACES = ((5, 4), (-10, -10), (5, -10), (-10, 4), (-2, 9), (-2, -15))
"""Where numbers stand beside their points, in turns: neighbours have different places."""


def draw(path: Path, title: str, results: Sequence[Result]) -> None:
    """Write an SVG file: a numbered point for each right answer, and the names in a key below.

    Numbers go from the fastest on. A bar shows the quartiles of a time; stairs join the fastest
    and those that take clearly less memory than all that are faster.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    points = [(r, r.time, r.peak_bytes) for r in timed(results) if r.time and r.peak_bytes]
    points.sort(key=lambda point: point[1].median)
    unbeaten = front(results)
    stairs = [(time.median, peak) for r, time, peak in points if r in unbeaten]
    # text stays text and ids are fixed: small files, and a diff shows what moved
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jacfunc", "font.size": 9}):
        size = WIDTH, HEIGHT + LINE * -(-len(points) // 2)
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(textwrap.fill(title, 60), fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="time of a call", ylabel="peak memory")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(LogLocator(10, (1, 3)))
        axes.yaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_major_formatter(lambda seconds, _: in_seconds(seconds))
        axes.yaxis.set_major_formatter(lambda count, _: in_bytes(round(count)))
        axes.minorticks_off()
        if stairs:
            times = [end for _, time, _ in points for end in (time.low, time.high)]
            peaks = [peak for _, _, peak in points]
            # room around the points, of which all may be equal
            axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
            axes.set_ylim(min(peaks) / 1.5, max(peaks) * 1.5)
            axes.step(*zip(*stairs, strict=True), where="post", color="gray", linewidth=0.8)
        for number, (result, time, peak) in enumerate(points, 1):
            marker, color = MARKS[result.family]
            bar = [[time.median - time.low], [time.high - time.median]]
            name = f"{number}  {result.contestant}"
            axes.errorbar(time.median, peak, None, bar, marker, color=color, ms=5, label=name)
            place = PLACES[number % len(PLACES)]
            axes.annotate(str(number), (time.median, peak), place, textcoords="offset points")
        if points:
            figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Title": f"Time against peak memory: {title}", "Date": None}
        figure.savefig(path, format="svg", metadata=about)
