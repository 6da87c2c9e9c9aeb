"""One lock for everything that a process has only once, and that all threads share.

Torch has one level of forward mode, one default generator of random numbers and one set of
switches; a module has one set of parameters. There is a single lock: with two, a thread could hold
one and wait for the other. Pullbacks of functions need no lock, and run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock, get_ident, main_thread
from typing import Any

import torch

_C = torch._C
_LOCK = RLock()
_THREAD = "jacfunc: the Python thread"
_MAIN = main_thread().ident


def alone() -> AbstractContextManager[Any]:
    """The lock, to be entered with ``with``; its thread may enter it again.

    A generator must not be suspended inside: another thread may resume it.
    """
    if torch.compiler.is_compiling():  # which can't trace a lock
        return nullcontext()
    if not _C._is_key_in_tls(_THREAD):
        if get_ident() == _MAIN or torch.cuda.is_initialized():
            # a thread that ends drops the key, which crashes while Python ends: so not for all
            _C._stash_obj_in_tls(_THREAD, get_ident())
    elif _is_held_for_us():
        return nullcontext()
    return _LOCK


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
