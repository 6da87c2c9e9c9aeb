"""Child processes: how they start, what they send, how they end and why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any

ANEW = multiprocessing.get_context("forkserver")
"""Children have the modules alone, and are told names: functions do not go through pipes."""

ALIKE = multiprocessing.get_context("fork")
"""Children have whatever is there."""

DEVICE_LOST = 86
"""Exit code of a child whose GPU takes no more work."""

KILLED = "crashed: SIGKILL, probably for lack of memory"


@contextmanager
def child(
    context: Any, function: Callable[..., None], *arguments: Any
) -> Iterator[tuple[Any, connection.Connection]]:
    """A process that runs ``function(pipe, *arguments)``, and the other end of its pipe."""
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def received(process: Any, pipe: connection.Connection) -> Any:
    """What a child sends, or its exit code where it ended before."""
    connection.wait([pipe, process.sentinel])
    # whoever the child started may hold the pipe open: reading could wait for ever
    if pipe.poll():
        with suppress(EOFError, OSError):
            return pipe.recv()
    process.join()
    return process.exitcode


def cause(code: int) -> str:
    """Why a child ended, from its exit code."""
    if code == DEVICE_LOST:
        return "crashed: the GPU takes no more work"
    if code >= 0:
        return f"crashed: exit code {code}"
    return KILLED if -code == signal.SIGKILL else f"crashed: {signal.Signals(-code).name}"


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
