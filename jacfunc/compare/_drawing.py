"""Figures in colors that a theme fills in; matplotlib is imported where one is drawn."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import quoteattr

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
"""Colors to draw with: a theme says what becomes of them."""
STYLES = {
    "jacfunc": ("#010110", "o"),
    "torch.func": ("#010111", "s"),
    "autograd": ("#010112", "^"),
    "rival": ("#010113", "D"),
    "JAX": ("#010114", "P"),
    "bound": ("#010115", "X"),
}
"""Color and marker by family; whoever cannot tell the colors apart has the shapes."""
LIGHT: Mapping[str, str] = {
    INK: "#1c1f23",
    MUTED: "#5b6067",
    GRID: "#e2e5e9",
    PAPER: "#ffffff",
    "#010110": "#0b63a5",
    "#010111": "#b54700",
    "#010112": "#5f5f5f",
    "#010113": "#00735a",
    "#010114": "#a03d7c",
    "#010115": "#7d6200",
}


def style(family: str) -> tuple[str, str]:
    """Color and marker of a family."""
    return STYLES.get(family, (INK, "v"))


def marked(family: str) -> dict[str, Any]:
    """How a lone point of a family looks."""
    color, marker = style(family)
    return {"color": color, "marker": marker, "markersize": 6, "linestyle": ""}


KEY_LINE = 0.165
"""Inches that a line of a key takes."""


def key(figure: Any, names: Sequence[str], looks: Sequence[Mapping[str, Any]]) -> None:
    """Names below the panels, each behind its line or marker; a whole figure grows by as much."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look) for look in looks]
    widest = max((width_of(name, 8.0) for name in names), default=0.0) + 28
    columns = max(1, min(4, int(figure.bbox.width / figure.dpi * 72 / widest)))
    if figure is figure.figure:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + KEY_LINE * math.ceil(len(names) / columns))
    small: Any = {"fontsize": 8, "labelspacing": 0.3, "handlelength": 1.6, "borderaxespad": 0.0}
    small |= {"ncols": columns, "columnspacing": 1.0, "frameon": False}
    figure.legend(handles, names, loc="outside lower left", **small)


def width_of(text: str, size: float) -> float:
    """Points of type that a line takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size)
    width: float = text_to_path.get_text_width_height_descent(text, font, False)[0]
    return width


def log_axis(
    axis: Any, values: Sequence[float], words: Callable[[float], str], most: int, base: int = 10
) -> None:
    """Logarithmic, with room around the values, and at most so many ticks, in words."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (math.log10(of(values, default=1.0)) for of in (min, max))
    # a panel of equal values would have no tick
    room = max(0.12 * (high - low), 0.35 - (high - low) / 2, 0.05)
    low, high = 10 ** (low - room), 10 ** (high + room)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(_ticks(low, high, most, base)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_locator(NullLocator())


def _ticks(low: float, high: float, most: int, base: int) -> list[float]:
    """The finest round numbers of which there are few enough."""
    ladders = [((1, 2, 5), 1), ((1, 3), 1)] if base == 10 else []
    ladders += [((1,), step) for step in (1, 2, 3, 4, 5, 10, 20)]
    first, last = (math.floor(math.log(end, base)) for end in (low, high))
    for parts, step in ladders:
        powers = (base**k for k in range(first - first % step, last + 1, step))
        inside = [part * power for power in powers for part in parts if low <= part * power <= high]
        if len(inside) <= most:
            return inside
    return []


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches, without pyplot's global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colors = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor"), INK
    )
    ticks = dict.fromkeys(("xtick.color", "ytick.color"), MUTED)
    # text stays text and ids are fixed: small files, and a diff shows what moved
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "jacfunc", "font.size": 9.0}
    look: Any = {
        **fixed,
        **colors,
        **ticks,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10.0,
        "axes.facecolor": "none",
        "grid.color": GRID,
        "figure.facecolor": PAPER,
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def settle(figure: Any) -> None:
    """Lay it out, once for all: from here on, places on the page are known."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")


def as_svg(figure: Any, theme: Mapping[str, str], said: str) -> str:
    """The figure in a theme's colors, with what is said of it to those who do not see it."""
    if figure.get_layout_engine() is not None:
        settle(figure)
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>| font-family: [^;\"]*;", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([^\")]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n", " ", svg)
    root = f'<svg role="img" aria-label={quoteattr(said)} {_TYPE} '
    svg = svg.replace("<svg ", root, 1)
    svg = svg.replace("> <", "><").replace(' "', '"')
    return re.sub(r"#0101[0-9a-f]{2}", lambda m: theme.get(m[0], m[0]), svg)


_TYPE = 'font-family="sans-serif" stroke-linejoin="round" stroke-linecap="butt"'
