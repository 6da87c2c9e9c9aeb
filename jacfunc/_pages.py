"""Memory for large results: a first write into fresh pages takes many times a second one."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

from jacfunc._functorch import inside_transform

LARGE = 2**22
"""Bytes from which on the kernel is asked, as NumPy does."""

HUGE_PAGE = 2**21


def empty(like: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
    """``like.new_empty``, on large pages where the kernel has them: a quarter of the time on Linux.

    It is advice, which the kernel may ignore, and changes nothing but time.
    """
    tensor = like.new_empty(shape, **options)
    is_plain = tensor.nbytes >= LARGE and tensor.is_cpu and type(tensor) is Tensor
    if is_plain and not (inside_transform() or torch.compiler.is_compiling()):
        _advise(tensor)
    return tensor


def _advise(tensor: Tensor) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0:
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
