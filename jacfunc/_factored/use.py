"""How a function uses its parameters: by views of them, and by operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from jacfunc._layouts import Key
from jacfunc._linear_map import Anchor
from jacfunc._torch import below_transforms
from jacfunc.layers import FormOf

_IN_BOTH_PLACES = (
    *("t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"),
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *("select", "narrow", "chunk", "split", "tensor_split", "unbind", "hsplit", "vsplit"),
)

VIEWS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(place, name) for name in _IN_BOTH_PLACES for place in (torch, Tensor)),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
        Tensor.view,
        Tensor.__getitem__,
    ]
)

_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *("requires_grad", "is_leaf", "is_cuda", "is_sparse", "is_quantized", "is_nested", "is_meta"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "get_device"),
    *("storage_offset", "is_contiguous", "is_floating_point", "is_complex", "__len__"),
)

METADATA: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        *(getattr(Tensor, name) for name in _METHODS),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    ]
)
"""Reads of a tensor's shape and the like, which do not touch its entries."""

_DATA: Any = Tensor.data
RAW_MEMORY: frozenset[Callable[..., Any]] = frozenset(
    [
        *(_DATA.__get__, _DATA.__set__),
        *(Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr),
        *(Tensor.untyped_storage, Tensor.set_),
    ]
)
"""Accesses to the memory itself: a write there does not raise the version of the tensor."""


_GRAD_FN: Any = Tensor.grad_fn
HOOKING: frozenset[Callable[..., Any]] = frozenset(
    [Tensor.register_hook, Tensor.retain_grad, _GRAD_FN.__get__]
)
"""What a backward pass has to do beside the derivatives; who reads a node may give it hooks."""


@dataclass(frozen=True)
class View:
    """A call that makes a view of a tensor: a part of it, or its entries in another order."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None
    """Which of several views the function returns; None if it returns one."""

    def __call__(self, whole: Tensor) -> Tensor:
        result = self.func(whole, *self.args, **self.kwargs)
        view: Tensor = result if self.item is None else result[self.item]
        return view


Path: TypeAlias = tuple[View, ...]
"""Views, each of the one before, that lead from a parameter to a part of it."""


def is_part(view: Any, whole: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is the result of a function of views a view of ``whole``, chosen by numbers alone?

    It is not if it is a copy, if it reads the memory as another dtype, or if a tensor among the
    other arguments chose it, which may have other values later.
    """
    if not isinstance(view, Tensor) or any(map(holds_tensors, (*args, *kwargs.values()))):
        return False
    part, tensor = below_transforms(view), below_transforms(whole)
    return part.dtype == tensor.dtype and shares_memory(part, tensor)


def holds_tensors(value: Any) -> bool:
    """Is the value a tensor, or a slice or list with one at any depth?"""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        return any(map(holds_tensors, value))
    return isinstance(value, Tensor)


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Have both tensors the same storage?"""
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


UsedPart: TypeAlias = tuple[int, Path, FormOf]
"""The number of a parameter, the views that lead to the part that was used, and its form."""


class KnownUse(NamedTuple):
    """What an earlier evaluation has shown of an operation with a rule, at the same place.

    Args:
        func: the operation.
        tensors: the names of the arguments that are tensors; with the number of the parameter that
            the rule covers, or None. No other argument is, or holds, a tracked tensor.
    """

    func: Callable[..., Any]
    tensors: Mapping[str, int | None]


@dataclass(eq=False)
class Use:
    """An operation with a rule, whose output cotangents are pulled back onto.

    Args:
        key: the number of the operation.
        anchor: the edge of the graph at the output, of all samples.
        place: makes cotangents ``[K, B, *z]`` of products for the edge, which have K in front.
        last: the node that the output came out of.
        ends: the nodes at which the parameters enter the operation.
        nbytes: bytes of the output.
        parts: the parts of parameters that were used.
    """

    key: Key
    anchor: Anchor
    place: Callable[[Tensor], Tensor]
    last: Any
    ends: set[Any]
    nbytes: int
    parts: Sequence[UsedPart] = ()
