"""Bytes of tensors, read from memory: an operation of torch takes a microsecond for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ctypes import c_char
from math import prod

from torch import Tensor


def bytes_in(tensors: Iterable[Tensor]) -> Callable[[], list[bytes]]:
    """What reads the bytes of each tensor on the CPU as they are now, without operations of torch.

    There are none of a tensor that lies elsewhere by then, as with a storage that was resized.
    """
    reads = [*map(_bytes_in, tensors)]
    return lambda: [read() for read in reads]


def _bytes_in(tensor: Tensor) -> Callable[[], bytes]:
    place, number = tensor.data_ptr(), tensor.numel()
    step = tensor.stride(0) if tensor.dim() == 1 else 1
    if not (number and step and (tensor.dim() == 1 or tensor.is_contiguous())):
        return lambda: _bytes_in(tensor.contiguous().view(-1))() if number else b""
    shape = (number - 1) * step + 1, tensor.element_size()
    memory = memoryview((c_char * prod(shape)).from_address(place)).cast("B")
    view = memory if step == 1 else memory.cast("B", shape)[::step]
    return lambda: view.tobytes() if tensor.data_ptr() == place else b""
