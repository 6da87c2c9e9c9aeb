"""Bytes of tensors, read from memory: they are those of a copy that torch makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jacfunc._memory import bytes_in

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda x: x.reshape(-1),
    "matrix": lambda x: x,
    "every third": lambda x: x.reshape(-1)[::3],
    "part": lambda x: x.reshape(-1)[5:9],
    "columns": lambda x: x[:, 1:3],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[0, 0].expand(3),
    "one": lambda x: x[1, 1],
    "none": lambda x: x[:0],
}
DTYPES = (torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128)


def as_torch_has_them(tensor: Tensor) -> bytes:
    """The bytes of a contiguous copy."""
    numbers: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return bytes(numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_a_copy(layout: str, dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    tensor = LAYOUTS[layout](whole)
    read = bytes_in([tensor])
    assert read() == [as_torch_has_them(tensor)]
    whole.copy_(whole.roll(1, 0).roll(1, 1))
    assert read() == [as_torch_has_them(tensor)]


def test_bytes_tell_what_torch_does_not_count() -> None:
    tensor = torch.tensor([0.0, torch.nan])
    read, alias, version = bytes_in([tensor]), tensor.data, tensor._version
    before = read()
    assert read() == before  # though nan is no nan's equal
    alias.neg_()
    assert tensor._version == version
    assert read() != before


def test_memory_that_was_given_back_is_not_read() -> None:
    tensor = torch.ones(64)
    read = bytes_in([tensor])
    tensor.untyped_storage().resize_(0)
    assert read() == [b""]
