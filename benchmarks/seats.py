"""A process for each contestant: its heap is as if nobody else were there.

What one contestant leaves in a heap is a gift to the next: on a CPU fresh pages are most of what a
large Jacobian costs, and whoever finds free ones beside him is twice as fast. A user calls one
way in a loop. On a GPU all stay in one process, for a device has one memory for all, and every
process would open it anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from typing import Any

import torch

from benchmarks.processes import ALIKE, child, end_with_parent, received
from jacfunc.compare._measuring import Entry
from jacfunc.compare._results import Result


class Apart(Entry):
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
        found = received(self._process, self._pipe)
        if not isinstance(found, Result):
            _end_alike(found)
        self.result = found


@contextmanager
def seats(device: torch.device) -> Iterator[Callable[[Entry], Entry]]:
    """Where entries take their steps."""
    with ExitStack() as processes:

        def apart(entry: Entry) -> Entry:
            return Apart(entry, *processes.enter_context(child(ALIKE, _serve, entry)))

        yield apart if device.type == "cpu" else lambda entry: entry


def _serve(pipe: connection.Connection, entry: Entry) -> None:
    end_with_parent()
    while True:
        step, arguments = pipe.recv()
        getattr(entry, step)(*arguments)
        pipe.send(entry.result)


def _end_alike(code: int) -> None:
    """By how the case ends, whoever looks on is told how its contestant did."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)
