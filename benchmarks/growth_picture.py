"""One picture of growth: time on log-log axes, a panel for each thing that grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import kernels
from benchmarks.growth import Curve

_STYLES = {kernels.OURS: ("#0072b2", "o"), kernels.MATMUL: ("#d55e00", "s")}
_WORDS = {"B": "samples B", "P": "parameters P", "C": "classes C"}


def draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Write the picture as SVG: what was measured, and dotted what the counted work says."""
    axes = list(dict.fromkeys(curve.axis for curve in curves))
    # text stays text and ids are fixed: small files, and a diff shows what moved
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jacfunc", "font.size": 9}):
        figure = Figure(figsize=(3.9 * len(axes), 3.9), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False).flat
        for panel, axis in zip(panels, axes, strict=True):
            _panel(panel, axis, [curve for curve in curves if curve.axis == axis])
        figure.axes[0].set_ylabel("time of the NTK, ms")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(panel: Any, axis: str, curves: Sequence[Curve]) -> None:
    panel.set(xscale="log", yscale="log", xlabel=_WORDS[axis])
    panel.grid(which="major", color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    # parameters span decades, the others doublings
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if axis == "P" else LogLocator(base=2))
    panel.xaxis.set_minor_locator(NullLocator())
    for each in (panel.xaxis, panel.yaxis):
        each.set_major_formatter(FuncFormatter(_short))
    for curve in curves:
        color, marker = _STYLES[curve.way]
        times = [value * 1e3 for value in curve.seconds]
        label = f"{curve.way}: {axis}^{curve.exponent:.2f}, counted {axis}^{curve.theory:.2f}"
        panel.plot(curve.sizes, times, marker + "-", color=color, markersize=5, label=label)
        # the largest size is where the work, not the calls, takes the time
        counted = [times[-1] * work / curve.work[-1] for work in curve.work]
        panel.plot(curve.sizes, counted, ":", color=color, linewidth=1.2)
    panel.legend(loc="upper left", fontsize=7, frameon=False)
    panel.margins(y=0.25)


def _short(value: float, _: int) -> str:
    """``250k`` for what is long."""
    for step, letter in ((1e6, "M"), (1e3, "k")):
        if value >= step:
            return f"{value / step:g}{letter}"
    return f"{value:g}"
