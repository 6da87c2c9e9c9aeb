"""How a function uses its parameters: by views of them, and by operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._layouts import Key
from jacfunc._linear_map import Anchor, Graph
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


_BY_INDEX = (
    *("gather", "take", "take_along_dim", "index_select", "index_add", "index_copy", "index_put"),
    *("index_fill", "index_reduce", "masked_select", "masked_scatter", "nonzero", "argwhere"),
    *("scatter", "scatter_add", "scatter_reduce", "unique", "unique_consecutive", "bincount"),
    *("multinomial", "histc", "put", "index_add_", "index_copy_", "index_put_", "index_fill_"),
    *("index_reduce_", "masked_scatter_", "scatter_", "scatter_add_", "scatter_reduce_", "put_"),
)
MOVING: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name) for name in _BY_INDEX for place in (torch, Tensor) if hasattr(place, name)
)
"""Operations that move numbers to where other numbers say, maybe to other samples."""


READING: frozenset[Callable[..., Any]] = frozenset(
    getattr(Tensor, name)
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist")
)
"""Reads of numbers by Python, which may choose by them what to do."""


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


def is_part(view: Any, whole: Tensor, options: Iterable[Any]) -> bool:
    """Is the result of a function of views a view of ``whole``, chosen by numbers alone?

    It is not if it is a copy, if it reads the memory as another dtype, or if a tensor among the
    options chose it, which may have other values later.
    """
    if not isinstance(view, Tensor) or any(map(_holds_tensors, options)):
        return False
    part, tensor = below_transforms(view), below_transforms(whole)
    return part.dtype == tensor.dtype and shares_memory(part, tensor)


def _holds_tensors(option: Any) -> bool:
    """Is the option a tensor, or a slice or list with one?"""
    if isinstance(option, slice):
        option = (option.start, option.stop, option.step)
    items = option if isinstance(option, tuple | list) else (option,)
    return any(isinstance(item, Tensor) for item in items)


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Have both tensors the same storage?"""
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


UNSEEN_WRITE = (
    "a parameter must be written into by operations that Python sees, or from the first call on, "
    "got a write by others, which has changed it. Write into a copy of it."
)


@dataclass(frozen=True)
class TrackedParameter:
    """A tensor that a function has, which is a parameter or a view of one."""

    number: int
    handle: Tensor
    """The tensor, known by its identity."""
    twin: Tensor
    """Operations with a rule get it in place of the handle."""
    path: Path
    """The views that lead from the parameter to the handle."""
    memory: Tensor
    """The handle without the wrappers of transforms, which knows of writes."""
    version: int
    """That of the memory when it was tracked: if it is another one, something has written there."""


@dataclass(frozen=True)
class UnruledUse:
    """Parameters, by number, that operations without a rule have got as arguments."""

    numbers: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """Parameters that were written into, or may have been."""


UsedPart: TypeAlias = tuple[int, Path, FormOf]
"""The number of a parameter, the views that lead to the part that was used, and its form."""


@dataclass(frozen=True)
class Use:
    """An operation with a rule, whose output cotangents are pulled back onto.

    Args:
        key: the number of the operation.
        anchor: the edge of the graph at the output, of all samples.
        place: makes cotangents ``[K, B, *z]`` of products for the edge, which have K in front.
        parts: the parts of parameters that were used.
        last: the node that the output came out of.
        ends: the nodes at which the parameters enter the operation.
        nodes: the nodes from ``ends`` up to ``last``, which the rule stands for.
        nbytes: bytes of the output.
    """

    key: Key
    anchor: Anchor
    place: Callable[[Tensor], Tensor]
    parts: Sequence[UsedPart]
    last: Any
    ends: set[Any]
    nodes: set[Any]
    nbytes: int

    def is_complete(self, graph: Graph) -> bool:
        """Do all paths to the operation's parameters pass through its output?

        They do not if the function takes a derivative itself, which uses the parameters again in
        operations that no rule sees.
        """
        inside = self.nodes | {self.last}
        return all(graph.met.get(node, set()) <= inside for node in self.nodes)
