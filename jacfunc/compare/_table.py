"""What came out of a comparison: a table, a sentence that says what to take, and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jacfunc._measuring import Result, spread_of
from jacfunc._types import Memory
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._advice import best, front, reasons, sentence
from jacfunc.compare._picture import draw
from jacfunc.compare._problem import API

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("time ÷ baseline", "time, ms", "peak", "max error", "estimate")
LEGEND = "★ take this  ◆ at least a fifth less memory than whatever is faster"


def check_extra() -> None:
    """Refuse to go on without what tables and pictures need."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{API}: rich and matplotlib must be installed, got no {' and no '.join(missing)}. "
            "Run pip install 'jacfunc[bench]'."
        )


def check_picture(path: str | Path) -> Path:
    """The path of a picture, which must be SVG."""
    if Path(path).suffix != ".svg":
        raise ValueError(
            f"{API}: the picture must be a file that ends in .svg, got {str(path)!r}. "
            "Browsers show such files, and most programs convert them."
        )
    return Path(path)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`jacfunc.compare.compare` measured; prints as the sentence that says what to take.

    Args:
        title: the problem, and where it was measured.
        results: one a contestant; a failure stays, with its reason.
        baseline: the contestant whose time is 1.
        checked: how answers were checked.
        memory: bytes that auto and autotune were to keep to.

    Example:
        >>> import torch
        >>> from jacfunc.compare import compare
        >>> comparison = compare((torch.sin, torch.zeros(3)), strategies=["reverse"], seconds=0.01)
        >>> [result.status for result in comparison.results]
        ['ok', 'ok']
        >>> comparison.best in comparison.results
        True
    """

    title: str
    results: tuple[Result, ...]
    baseline: str
    checked: str
    memory: Memory = None

    @property
    def best(self) -> Result | None:
        """The fastest result; of the strategies that are as fast, the first of the table."""
        return best(self.results)

    def table(self) -> Table:
        """A table for rich to print."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.title),
            caption=Text("\n".join([LEGEND, self.checked, *reasons(self.results)])),
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("strategy", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        unbeaten = front(self.results)
        for result in self.results:
            is_best = result is self.best
            mark = "★" if is_best else "◆" if any(result is r for r in unbeaten) else " "
            suffix = " (baseline)" if result.contestant == self.baseline else ""
            name = Text(f"{mark} {result.contestant}{suffix}")
            style = ("bold green" if is_best else "") if result.ok else "red"
            table.add_row(name, *map(Text, _cells(result)), style=style)
        return table

    def picture(self, path: str | Path) -> None:
        """Write a picture of time against memory to an SVG file."""
        check_extra()
        draw(check_picture(path), self.title, self.results)

    def __repr__(self) -> str:
        return sentence(self.results, self.baseline, self.memory)


def _cells(result: Result) -> tuple[str, ...]:
    """What stands in the columns of a result; a failure has its kind and the estimate."""
    estimate = "-"
    if result.forecast_seconds is not None:
        peak = "" if result.forecast_bytes is None else f", {in_bytes(result.forecast_bytes)}"
        estimate = in_seconds(result.forecast_seconds) + peak
    if not result.ok:
        return result.status.partition(":")[0], "", "", "", estimate
    error = "-" if result.error is None else f"{result.error:.0e}" if result.error else "0"
    time = "-" if result.time is None else spread_of(result.time, 1e3)
    ratio = "-" if result.ratio is None else spread_of(result.ratio)
    return ratio, time, in_bytes(result.peak_bytes), error, estimate
