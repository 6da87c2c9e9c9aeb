"""Operations that show a part of a parameter, in another order: what is written there is in J."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._torch import below_transforms

_BOTH = (
    *("t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"),
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *("select", "narrow", "chunk", "split", "tensor_split", "unbind", "hsplit", "vsplit"),
)

VIEWS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(place, name) for name in _BOTH for place in (torch, Tensor)),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
        Tensor.view,
        Tensor.__getitem__,
    ]
)

_ASKED = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *("requires_grad", "is_leaf", "is_cuda", "is_sparse", "is_quantized", "is_nested", "is_meta"),
)
_COUNTED = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "get_device"),
    *("storage_offset", "is_contiguous", "is_floating_point", "is_complex", "__len__"),
)

METADATA: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _ASKED),
        *(getattr(Tensor, name) for name in _COUNTED),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    ]
)
"""What tells something of a tensor, and has nothing to do with its entries."""

_DATA: Any = Tensor.data
RAW_MEMORY: frozenset[Callable[..., Any]] = frozenset(
    [
        *(_DATA.__get__, _DATA.__set__),
        *(Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr),
        *(Tensor.untyped_storage, Tensor.set_),
    ]
)
"""What hands out the memory itself: whoever writes there does not raise the tensor's version."""


@dataclass(frozen=True)
class View:
    """A part of a tensor, or another order of its entries."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None
    """Of several that the function returns."""

    def __call__(self, whole: Tensor) -> Tensor:
        viewed = self.func(whole, *self.args, **self.kwargs)
        part: Tensor = viewed if self.item is None else viewed[self.item]
        return part


Path: TypeAlias = tuple[View, ...]
"""One of the other: which part of a parameter it is."""


def is_part(held: Any, whole: Tensor, options: Iterable[Any]) -> bool:
    """Are these entries of ``whole``, whatever it holds, chosen by numbers alone?

    Not a copy, which some of these functions return where no view can be; nor other numbers by
    the same bits; nor what a tensor among the options chose, which may hold others later.
    """
    if not isinstance(held, Tensor) or any(map(_holds_tensors, options)):
        return False
    mine, theirs = below_transforms(held), below_transforms(whole)
    return mine.dtype == theirs.dtype and shares_memory(mine, theirs)


def _holds_tensors(option: Any) -> bool:
    if isinstance(option, slice):
        option = (option.start, option.stop, option.step)
    every = option if isinstance(option, tuple | list) else (option,)
    return any(isinstance(each, Tensor) for each in every)


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Is what is written into one in the other, too?"""
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
