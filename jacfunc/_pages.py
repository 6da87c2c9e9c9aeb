"""Memory for large results: a page that is met when it is written to costs a fault of its own."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from jacfunc._functorch import inside_transform

LARGE = 2**27
"""Bytes from which on one request for all pages takes less than their faults."""

POPULATE = 23
"""``MADV_POPULATE_WRITE``, of Linux since 5.14; older kernels decline."""


def empty(like: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
    """``like.new_empty`` for what will be written to the end: all its pages at once, if large."""
    tensor = like.new_empty(shape, **options)
    is_plain = tensor.nbytes >= LARGE and tensor.is_cpu and type(tensor) is Tensor
    if is_plain and sys.platform == "linux" and not _is_hidden():
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        whole = size // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(whole), POPULATE)
    return tensor


def _is_hidden() -> bool:
    """Is a tensor not what it seems, so that it has no memory to ask for?"""
    return inside_transform() or torch.compiler.is_compiling()


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
