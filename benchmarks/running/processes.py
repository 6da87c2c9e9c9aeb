"""Child processes: how they start, what they send, how they end and why, and who has one."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import connection
from typing import Any, NoReturn, TypeVar

import torch

from jacfunc._measuring import Check, Entry, Result

T = TypeVar("T")
# its children have the modules alone, and are told names: functions do not go through pipes
ANEW = multiprocessing.get_context("forkserver")
ALIKE = multiprocessing.get_context("fork")  # its children have whatever their parent has
# a folder whose files are memory, or None for the usual one of temporary files
SHARED = "/dev/shm" if os.path.isdir("/dev/shm") else None
DEVICE_LOST = 86  # exit code of a child whose GPU takes no more work


@contextmanager
def child(
    context: Any, function: Callable[..., None], *arguments: Any
) -> Iterator[tuple[Any, connection.Connection]]:
    """A process that runs ``function(pipe, *arguments)``, and the other end of its pipe."""
    parent_end, child_end = context.Pipe()
    process = context.Process(target=function, args=(child_end, *arguments))
    process.start()
    child_end.close()
    try:
        yield process, parent_end
    finally:
        process.kill()
        process.join()
        parent_end.close()


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
    hint = ", probably for lack of memory" if -code == signal.SIGKILL else ""
    return f"crashed: {signal.Signals(-code).name}{hint}"


def aside(function: Callable[[], T]) -> T:
    """What a function returns or raises in a process alike, so that this heap stays as it is.
    Tensors of the result lie in memory of their own.
    """
    with tempfile.NamedTemporaryFile(dir=SHARED) as file:
        with child(ALIKE, _keep, function, file.name) as (process, pipe):
            outcome = received(process, pipe)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            end_alike(outcome)
        result: T = torch.load(file.name, mmap=True, weights_only=False)
        return result


def _keep(pipe: connection.Connection, function: Callable[[], Any], name: str) -> None:
    end_with_parent()
    try:
        torch.save(function(), name)
    except Exception as error:
        # it is raised where the result was asked for
        pipe.send(error)
    else:
        pipe.send(None)


def end_alike(code: int) -> NoReturn:
    """End this process as its child ended, so that whoever looks on learns of it."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait = partial(connection.wait, [parent.sentinel])
        threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


class Together:
    """One process for all contestants and the judge."""

    def seat(self, entry: Entry) -> Entry:
        """The entry, wherever its steps are taken."""
        return entry

    def judge(self, make: Callable[[], Check]) -> Check:
        """The check that ``make`` gives, wherever it is made and whenever it is asked."""
        return make()


class Apart(Together):
    """A process for each contestant, and one for every judgement, so that heaps are a user's.
    What one contestant, or the judge, leaves in a heap is a gift to the next: on a CPU fresh pages
    are most of what a large Jacobian costs, and whoever has free ones is twice as fast. On a GPU
    all stay together, for a device has one memory for all, and every process would open it anew.
    """

    def __init__(self, processes: ExitStack) -> None:
        self._processes = processes

    def seat(self, entry: Entry) -> Entry:
        return _Distant(entry, *self._processes.enter_context(child(ALIKE, _serve, entry)))

    def judge(self, make: Callable[[], Check]) -> Check:
        check = aside(make)
        return lambda answer: aside(partial(check, answer))


@contextmanager
def seats(device: torch.device, is_apart: bool) -> Iterator[Together]:
    """Where the entries of a case take their steps."""
    with ExitStack() as processes:
        yield Apart(processes) if is_apart and device.type == "cpu" else Together()


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
