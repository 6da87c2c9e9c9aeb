"""What the C library's heap does with freed memory: keep it for later calls, or give it back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

import torch

from jacfunc._memory.limits import LARGE

KEPT_BYTES = LARGE - 2**16
"""Bytes of the largest block that the heap keeps, less what the heap adds to a block."""


@cache
def keep_heap() -> None:
    """Make the heap keep the memory that a call frees, for the next call.

    glibc returns free memory at the end of the heap to the system, but for twice the largest block
    that was ever freed (``M_TRIM_THRESHOLD`` in mallopt(3)). In a young process that is so little
    that a network of a megabyte asks for the same pages in each call. So one large block is freed
    here; nothing is written into it. A threshold that the user has set stays as it is.
    """
    torch.UntypedStorage(KEPT_BYTES)  # no operation: modes and transforms would see one


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
