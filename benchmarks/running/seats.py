"""Where contestants take their steps: each in a process whose heap is as its user's would be.

What one contestant, or the judge, leaves in a heap is a gift to the next: on a CPU fresh pages are
most of what a large Jacobian costs, and whoever has free ones is twice as fast. A user sets up a
problem and calls one way in a loop. On a GPU all stay in one process, for a device has one memory
for all, and every process would open it anew.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import connection
from typing import Any

import torch

from benchmarks.running.processes import ALIKE, aside, child, end_alike, end_with_parent, received
from jacfunc._measuring import Check, Entry, Result


class Together:
    """One process for all contestants and the judge."""

    def seat(self, entry: Entry) -> Entry:
        """The entry, wherever its steps are taken."""
        return entry

    def judge(self, make: Callable[[], Check]) -> Check:
        """The check that ``make`` gives, wherever it is made and whenever it is asked."""
        return make()


class Apart(Together):
    """A process for each contestant, and one for every judgement."""

    def __init__(self, processes: ExitStack) -> None:
        self._processes = processes

    def seat(self, entry: Entry) -> Entry:
        return _Distant(entry, *self._processes.enter_context(child(ALIKE, _serve, entry)))

    def judge(self, make: Callable[[], Check]) -> Check:
        return partial(_judged, aside(make))


@contextmanager
def seats(device: torch.device) -> Iterator[Together]:
    """Where the entries of a case take their steps."""
    with ExitStack() as processes:
        yield Apart(processes) if device.type == "cpu" else Together()


class _Distant(Entry):
    """An entry whose steps are taken by a process that has nothing else to do."""

    def __init__(self, entry: Entry, process: Any, pipe: connection.Connection) -> None:
        self.result = entry.result
        self._process, self._pipe = process, pipe

    def prepare(self) -> None:
        self._take("prepare")

    def weigh(self) -> None:
        self._take("weigh")

    def time(self, number: int) -> None:
        self._take("time", number)

    def _take(self, step: str, *arguments: int) -> None:
        self._pipe.send((step, arguments))
        result = received(self._process, self._pipe)
        if not isinstance(result, Result):
            end_alike(result)
        self.result = result


def _serve(pipe: connection.Connection, entry: Entry) -> None:
    end_with_parent()
    while True:
        step, arguments = pipe.recv()
        getattr(entry, step)(*arguments)
        pipe.send(entry.result)


def _judged(check: Check, answer: Any) -> float:
    return aside(partial(check, answer))
