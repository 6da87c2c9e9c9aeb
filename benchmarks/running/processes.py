"""Child processes: how they start, what they send, how they end and why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")

ANEW = multiprocessing.get_context("forkserver")
"""Children have the modules alone, and are told names: functions do not go through pipes."""

ALIKE = multiprocessing.get_context("fork")
"""Children have whatever is there."""

SHARED = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where a file is memory, else it is one among others."""

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


def aside(function: Callable[[], T]) -> T:
    """What a function gives or raises in a process alike: its work leaves nothing in this heap.

    Tensors of what it gives lie in memory of their own.
    """
    with tempfile.NamedTemporaryFile(dir=SHARED) as file:
        with child(ALIKE, _keep, function, file.name) as (process, pipe):
            found = received(process, pipe)
        if isinstance(found, Exception):
            raise found
        if found is not None:
            end_alike(found)
        given: T = torch.load(file.name, mmap=True, weights_only=False)
        return given


def _keep(pipe: connection.Connection, function: Callable[[], Any], name: str) -> None:
    end_with_parent()
    try:
        torch.save(function(), name)
    except Exception as error:
        # it is the caller's, who has asked for what failed
        pipe.send(error)
    else:
        pipe.send(None)


def end_alike(code: int) -> NoReturn:
    """By how a process ends, whoever looks on is told how its child did."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
