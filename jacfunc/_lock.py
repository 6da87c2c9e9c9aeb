"""One lock for everything that a process has only once, and that all threads share.

Torch has one level of forward mode, one default generator of random numbers and one set of
switches; a module has one set of parameters. There is a single lock: with two, a thread could hold
one and wait for the other. Pullbacks of functions need no lock, and run side by side.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import RLock, get_ident, main_thread
from types import FrameType
from typing import Any, Generic, Self, TypeVar, overload

import torch

OwnerT = TypeVar("OwnerT")
ValueT = TypeVar("ValueT")

_C = torch._C
_LOCK = RLock()
_THREAD = "jacfunc: the Python thread"
_MAIN = main_thread().ident

LOOK_SECONDS, MOST_LOOKS = 0.05, 10
"""After so many looks in a row, at which the thread with the lock waited for this one, it is told.
"""
_WAITING = frozenset({"threading", "queue", "concurrent", "asyncio", "multiprocessing"})
"""Where Python's own code waits for other threads."""


def alone() -> AbstractContextManager[Any]:
    """The lock, to be entered with ``with``; its thread may enter it again.

    A generator must not be suspended inside: another thread may resume it.

    Raises:
        RuntimeError: when it is entered, if the thread that has the lock waits for this one.
    """
    if torch.compiler.is_compiling():  # which can't trace a lock
        return nullcontext()
    if not _C._is_key_in_tls(_THREAD):
        if get_ident() != _MAIN and not torch.cuda.is_initialized():
            return _FROM_THREAD
        # a thread that ends drops the key, which crashes while Python ends: so not for all
        _C._stash_obj_in_tls(_THREAD, get_ident())
    elif _is_held_for_us():
        return nullcontext()
    return _LOCK if get_ident() == _MAIN else _FROM_THREAD


def holds_alone(question: Callable[[], bool]) -> bool:
    """The answer to ``question``, asked under the lock; False if another thread holds the lock."""
    if _C._is_key_in_tls(_THREAD) and _is_held_for_us():
        return question()
    if not _LOCK.acquire(blocking=False):
        return False
    try:
        return question()
    finally:
        _LOCK.release()


def _is_held_for_us() -> bool:
    """Does the thread that called this one, and waits for it, hold the lock?

    A backward pass on an accelerator runs hooks in a thread of torch's own. Torch hands on to it
    what it keeps for the calling thread, the identity of that thread among it. If the calling
    thread holds the lock, to wait for it would be to wait for ever.
    """
    caller: int = _C._get_obj_in_tls(_THREAD)
    # only the repr of a lock says which thread holds it
    return caller != get_ident() and f"owner={caller} " in repr(_LOCK)


class _FromThread:
    """The lock for threads of the user's: what holds it may have started one, and wait for it."""

    def __enter__(self) -> None:
        looks = 0
        while not _LOCK.acquire(timeout=LOOK_SECONDS):
            looks = looks + 1 if _is_waited_for() else 0
            if looks == MOST_LOOKS:
                raise RuntimeError(
                    "jacfunc: a function must not wait for a thread that calls jacfunc while it is "
                    "differentiated itself, got a call in such a thread: each would wait for the "
                    "other for ever. Make the call in the thread that runs the function."
                )

    def __exit__(self, *error: object) -> None:
        _LOCK.release()


_FROM_THREAD = _FromThread()


def _is_waited_for() -> bool:
    """Does the thread that has the lock wait for what this thread knows: itself, or its result?

    Python does not tell for whom a thread waits. But what it waits with is an object in Python's
    own code for it: this thread, a future, an event, a queue. Who ends the wait knows that, too.
    """
    holder = re.search(r"owner=(\d+)", repr(_LOCK))
    frames = sys._current_frames()
    waits = frames.get(int(holder[1])) if holder else None
    waited = set[int]()
    for frame in _frames_from(waits):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _WAITING:
            break
        waited |= {id(x) for x in frame.f_locals.values() if _is_waited_with(x)}
    if not waited:
        return False
    known = [x for frame in _frames_from(sys._getframe(2)) for x in frame.f_locals.values()]
    within = [x for own in known for x in getattr(own, "__dict__", {}).values()]
    return not waited.isdisjoint(map(id, (*known, *within)))


def _is_waited_with(x: object) -> bool:
    """Is it of a class of Python's for threads?"""
    return type(x).__module__.partition(".")[0] in _WAITING


def _frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class kept_property(Generic[OwnerT, ValueT]):  # noqa: N801 (it is used as a decorator)
    """A property that is computed when it is first read, and kept in the object.

    It is ``functools.cached_property`` without its lock, for values that an evaluation computes.
    Until Python 3.12 all objects of a class share that lock: a thread that holds it and waits for
    :func:`alone` would wait for ever where the thread inside reads the same property of another
    object. If two threads compute a value at once, one of the two is kept.

    Example:
        >>> from jacfunc._lock import kept_property
        >>> class Three:
        ...     @kept_property
        ...     def squared(self):
        ...         return print("computed") or 9
        >>> three = Three()
        >>> three.squared, three.squared
        computed
        (9, 9)
    """

    def __init__(self, compute: Callable[[OwnerT], ValueT]) -> None:
        self._compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type[OwnerT], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type[OwnerT]) -> Self: ...
    @overload
    def __get__(self, instance: OwnerT, owner: type[OwnerT]) -> ValueT: ...
    def __get__(self, instance: OwnerT | None, owner: type[OwnerT]) -> Self | ValueT:
        if instance is None:
            return self
        value = self._compute(instance)
        kept: ValueT = vars(instance).setdefault(self._name, value)
        return kept
