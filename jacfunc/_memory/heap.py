"""The heap of the C library: what is freed stays with the process."""

from __future__ import annotations

from functools import cache

import torch

from jacfunc._memory.limits import LARGE

KEPT_BYTES = LARGE - 2**16
"""Bytes of the largest block that a heap keeps, with what it adds to it."""


@cache
def keep_heap() -> None:
    """From here on what a call frees stays in the heap, for the next one.

    glibc gives back what is free at the end of the heap, beyond twice the largest block that has
    been freed so far (``M_TRIM_THRESHOLD`` in mallopt(3)). In a young process that is so little
    that a network of a megabyte asks for the same pages in each call. One block is enough, which
    nothing is written into; where somebody has set the threshold, it stays as it is.
    """
    torch.UntypedStorage(KEPT_BYTES)  # no operation, which modes and transforms would see
