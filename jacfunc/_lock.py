"""One lock for what a process has only once, whatever the thread.

Torch has one level of forward mode, one default generator of random numbers, one set of switches; a
module has one set of parameters. It is a single lock, because of two a thread could hold one and
wait for the other. Pullbacks of functions need none of these, and run side by side.
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
    """While it is entered, no other thread enters it; a thread may enter it again and again.

    Never held while a generator is suspended: whoever goes on with it may be another thread.
    """
    if torch.compiler.is_compiling():  # which can't trace a lock
        return nullcontext()
    if not _C._is_key_in_tls(_THREAD):
        if get_ident() == _MAIN or torch.cuda.is_initialized():
            # a thread that ends drops it, which crashes while Python ends: kept where it is needed
            _C._stash_obj_in_tls(_THREAD, get_ident())
    elif _is_held_for_us():
        return nullcontext()
    return _LOCK


def holds_alone(question: Callable[[], bool]) -> bool:
    """Is it so, asked while no other thread can change it? Not if another thread is in there."""
    if _C._is_key_in_tls(_THREAD) and _is_held_for_us():
        return question()
    if not _LOCK.acquire(blocking=False):
        return False
    try:
        return question()
    finally:
        _LOCK.release()


def _is_held_for_us() -> bool:
    """Does the thread that waits for this one have the lock?

    A backward pass on an accelerator runs hooks in a thread of torch's own, which gets what torch
    keeps for the thread that called it, the name of that thread among it. To wait for a lock that
    it has would be to wait for ever.
    """
    caller: int = _C._get_obj_in_tls(_THREAD)
    # a lock tells in nothing but its repr which thread has it
    return caller != get_ident() and f"owner={caller} " in repr(_LOCK)
