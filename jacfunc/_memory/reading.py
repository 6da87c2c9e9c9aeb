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
    every = [*tensors]
    places, reads = [*map(Tensor.data_ptr, every)], [*map(_bytes_in, every)]

    def now() -> list[bytes]:
        those = [*map(Tensor.data_ptr, every)]
        if those == places:
            return [read() for read in reads]
        return [read() if p == q else b"" for read, p, q in zip(reads, places, those, strict=True)]

    return now


def _bytes_in(tensor: Tensor) -> Callable[[], bytes]:
    """What reads the bytes of a tensor that lies where it lies now, and is kept by the caller."""
    number, step = tensor.numel(), tensor.stride(0) if tensor.dim() == 1 else 1
    if not (number and step and (tensor.dim() == 1 or tensor.is_contiguous())):
        return lambda: bytes_in([tensor.contiguous().view(-1)])()[0] if number else b""
    shape = (number - 1) * step + 1, tensor.element_size()
    memory = memoryview((c_char * prod(shape)).from_address(tensor.data_ptr())).cast("B")
    return memory.tobytes if step == 1 else memory.cast("B", shape)[::step].tobytes
