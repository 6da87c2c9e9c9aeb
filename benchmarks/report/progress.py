"""How far a run has come: a bar on the terminal, and a table for every case that is finished."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.report.tables import console, of_case
from benchmarks.running.records import Record


class Watch:
    """Is told by a run how far it has come, and says so; the bar's units are expected seconds."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._expected = bar, dict[str, float]()
        self._task = bar.add_task("", total=None, turn="")

    def begin(self, expected: Mapping[str, float]) -> None:
        """These cases are run, and take so many seconds each."""
        self._expected = dict(expected)
        self._bar.reset(self._task, total=sum(expected.values()))
        # time left is told by what was done between two advances: this is the first
        self._bar.advance(self._task, 0)

    def case(self, key: str) -> None:
        self._bar.update(self._task, description=key, turn="setup")

    def contestant(self, name: str | None) -> None:
        """Whose turn it is; None while the case is set up."""
        self._bar.update(self._task, turn=name or "setup")

    def finished(self, key: str, record: Record) -> None:
        self._bar.advance(self._task, self._expected[key])
        self._bar.console.print(of_case(record), "")


@contextmanager
def watching() -> Iterator[Watch]:
    """A bar on the terminal while the suite runs; the time left follows all finished cases."""
    case, turn = TextColumn("{task.description}"), TextColumn("{task.fields[turn]}")
    columns = case, BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn(), turn
    with Progress(*columns, console=console, speed_estimate_period=float("inf")) as bar:
        yield Watch(bar)
