"""What the C library's heap does with freed memory: keep it for later calls, or give it back."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from jacfunc._lock import alone
from jacfunc._memory.limits import LARGE

KEPT_BYTES = LARGE - 2**16
"""Bytes of the largest block that the heap keeps, less what the heap adds to a block."""

MAPPED_SHARE, LEAST_MAPPED = 128, 2**16
"""On a budget, a block of more than this part of it has pages of its own, but for small blocks."""

WORK_SHARE = 32
"""On a budget, what work makes at a time takes at most this part of it."""

M_MMAP_THRESHOLD = -3
"""The number that mallopt(3) has for the size from which blocks have pages of their own."""


@cache
def keep_heap() -> None:
    """Make the heap keep the memory that a call frees, for the next call.

    glibc returns free memory at the end of the heap to the system, but for twice the largest block
    that was ever freed (``M_TRIM_THRESHOLD`` in mallopt(3)). In a young process that is so little
    that a network of a megabyte asks for the same pages in each call. So one large block is freed
    here; nothing is written into it. A threshold that the user has set stays as it is.
    """
    torch.UntypedStorage(KEPT_BYTES)  # no operation: modes and transforms would see one


class _Here(threading.local):
    """The budgets of the calls that this thread is in."""

    def __init__(self) -> None:
        self.budgets: list[int] = []


_here = _Here()


def at_most(nbytes: int) -> int:
    """A number of bytes, or a small part of the budget of the call around, if that is less.

    There may be copies, and what lies between those bytes and the others that work is counted by.
    """
    return min((nbytes, *(max(1, budget // WORK_SHARE) for budget in _here.budgets)))


def is_on_a_budget() -> bool:
    """Has the call around a budget of bytes?"""
    return bool(_here.budgets)


def sparing(nbytes: int | None) -> AbstractContextManager[None]:
    """A context for work on a budget of bytes, in which large blocks go back as they are freed.

    In a heap that is kept, what is freed may be too small for the next block, or lie between blocks
    in use: the process takes up to twice the bytes of its tensors. So blocks get pages of their
    own, which costs time to have them anew. What is made at once is less, too: see :func:`at_most`.
    """
    return nullcontext() if nbytes is None else _sparing(nbytes)


@contextmanager
def _sparing(nbytes: int) -> Iterator[None]:
    _here.budgets.append(nbytes)
    try:
        with mapped(max(LEAST_MAPPED, nbytes // MAPPED_SHARE)):
            yield
    finally:
        _here.budgets.remove(nbytes)


@contextmanager
def mapped(size: int = LEAST_MAPPED) -> Iterator[None]:
    """A context in which blocks of so many bytes have pages of their own, and leave no gaps."""
    heap = _heap()
    if heap is not None:
        with alone():
            heap.map_from(*heap.sizes, size)
    try:
        yield
    finally:
        if heap is not None:
            with alone():
                heap.sizes.remove(size)
                heap.map_from(*heap.sizes)


class _Heap:
    """The heap of glibc; how large a block must be to have pages of its own."""

    def __init__(self, mallopt: Callable[[int, int], int]) -> None:
        keep_heap()  # the first call of mallopt fixes other sizes, too, as they are then
        self._mallopt, self.sizes = mallopt, [LARGE]

    def map_from(self, *sizes: int) -> None:
        """Let the smallest of these sizes, each of which somebody needs, be the one."""
        self.sizes = list(sizes)
        self._mallopt(M_MMAP_THRESHOLD, min(sizes))


@cache
def _heap() -> _Heap | None:
    """The heap of the process; None where it is another library's, or the user has set it."""
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or _trim() is None:
        return None
    return _Heap(ctypes.CDLL(None).mallopt)


def give_back() -> None:
    """Give the free pages of the heap back to the system, where the C library has a way to.

    What is allocated next, in other sizes, need then not lie beside them.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of glibc, which finds free pages between blocks in use, too."""
    if os.name != "posix":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
