"""What came out: a table, a sentence that says what to take, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jacfunc._measuring import Expected, Result, spread
from jacfunc._types import Memory
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._advice import Advice
from jacfunc.compare._pareto import Point, pareto_svg
from jacfunc.compare._problem import API

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

COLUMNS = ("time ÷ baseline", "time, ms", "peak", "max error", "estimate")
LEGEND = "★ take this  ◆ nothing is faster with as little memory"


def check_extra() -> None:
    """Table and picture need more than jacfunc does."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{API}: rich and matplotlib must be installed, got no {' and no '.join(missing)}. "
            "Run pip install 'jacfunc[bench]'."
        )


def check_picture(path: str | Path) -> Path:
    """Pictures are SVG."""
    if Path(path).suffix != ".svg":
        raise ValueError(
            f"{API}: the picture must be a file that ends in .svg, got {str(path)!r}. "
            "Browsers show such files, and most programs convert them."
        )
    return Path(path)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`jacfunc.compare.compare` found; prints as the sentence that says what to take.

    Args:
        title: the problem, and where it was measured.
        results: one a contestant, failures with their reason among them.
        baseline: the contestant whose time is 1.
        checked: how answers were checked.
        memory: that auto and autotune were to keep to.

    Example:
        >>> import torch
        >>> from jacfunc.compare import compare
        >>> found = compare((torch.sin, torch.zeros(3)), strategies=["reverse"], seconds=0.01)
        >>> [result.status for result in found.results], found.best in found.results
        (['ok', 'ok'], True)
    """

    title: str
    results: tuple[Result, ...]
    baseline: str
    checked: str
    memory: Memory = None

    @property
    def best(self) -> Result | None:
        """The fastest; of the strategies that tie with it, the first of the table."""
        return self._advice.best

    def table(self) -> Table:
        """For rich to print."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(
            title=Text(self.title),
            caption=Text("\n".join([LEGEND, self.checked, *self._advice.reasons()])),
            title_justify="left",
            caption_justify="left",
        )
        shown.add_column("strategy", no_wrap=True)
        for heading in COLUMNS:
            shown.add_column(heading, justify="right")
        best, front = self.best, self._advice.front
        for result in self.results:
            mark = "★" if result is best else "◆" if any(result is r for r in front) else " "
            mine = " (baseline)" if result.contestant == self.baseline else ""
            name = Text(f"{mark} {result.contestant}{mine}")
            style = ("bold green" if result is best else "") if result.ok else "red"
            shown.add_row(name, *map(Text, _cells(result)), style=style)
        return shown

    def picture(self, path: str | Path) -> None:
        """Time against memory, as SVG."""
        check_extra()
        path = check_picture(path)
        points = [
            Point(r.contestant, r.family, r.time.median, r.time.low, r.time.high, r.peak_bytes)
            for r in self._advice.timed
            if r.time is not None and r.peak_bytes is not None
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pareto_svg(self.title, points), encoding="utf-8")

    def __repr__(self) -> str:
        return self._advice.sentence()

    @property
    def _advice(self) -> Advice:
        return Advice(self.results, self.baseline, self.memory)


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[Progress]:
    """With the time left, where there is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as progress:
        yield progress


def _cells(result: Result) -> tuple[str, ...]:
    if not result.ok:
        return result.status.partition(":")[0], "", "", "", _estimate(result.forecast)
    error = "-" if result.error is None else f"{result.error:.0e}" if result.error else "0"
    time = "-" if result.time is None else spread(result.time, 1e3)
    ratio = "-" if result.ratio is None else spread(result.ratio)
    return ratio, time, in_bytes(result.peak_bytes), error, _estimate(result.forecast)


def _estimate(forecast: Expected | None) -> str:
    if forecast is None or forecast.seconds is None:
        return "-"
    peak = "" if forecast.peak_bytes is None else f", {in_bytes(forecast.peak_bytes)}"
    return in_seconds(forecast.seconds) + peak
