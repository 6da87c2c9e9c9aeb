"""Types that all packages share: of what flows between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any, Concatenate, Literal, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor
from typing_extensions import TypeVar

Tree: TypeAlias = Any
"""Any nesting of containers that optree or torch's own pytree knows."""

Params = TypeVar("Params", default=dict[str, Tensor])
"""The tree of a function's parameters; of a module a dict by name."""

_Params = TypeVar("_Params", contravariant=True)


class OfParams(Protocol[_Params]):
    """A function of parameters and a batch: ``func(params, *inputs)``."""

    def __call__(self, params: _Params, /, *inputs: Any, **named: Any) -> Any: ...


Leaves: TypeAlias = tuple[Tensor, ...]
"""Tensors of a tree, in order; a chunk of K seeds or products is Leaves of ``[K, *shape]``."""

Blocks: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""``blocks[i][j]`` has shape ``[*out_i, *in_j]``: output leaf i against input leaf j."""

RowMap: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of vectors in rows: ``[K, N]`` → ``[K, M]``."""

LeafFunction: TypeAlias = Callable[..., tuple[Leaves, Leaves]]
"""``func(*primals) -> (outputs, extras)``; extras are tensors that are not differentiated."""

Argnums: TypeAlias = int | tuple[int, ...]
"""Positions of the arguments to differentiate."""

Memory: TypeAlias = int | str | None
"""A budget in bytes, as a number or in words (``"2 GiB"``); None for none."""

Rows: TypeAlias = slice | Sequence[int] | Tensor | None
"""Rows along the first dimension of a tensor: a slice, numbers, or a mask; None for all."""

Randomness: TypeAlias = Literal["error", "same", "different"]
"""For random functions: refuse them, draw the same numbers for all, or others for each."""

InT = TypeVar("InT")
OutT = TypeVar("OutT")
AuxT = TypeVar("AuxT")
ArgumentT = TypeVar("ArgumentT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)


class FunctionOf(Protocol[ArgumentT, ResultT]):
    """A function whose first argument, and whose result, have known types."""

    def __call__(self, argument: ArgumentT, /, *args: Any, **kwargs: Any) -> ResultT:
        """The result."""
        ...


Func: TypeAlias = Callable[..., Any]
OfOne: TypeAlias = Callable[Concatenate[InT, ...], Tensor]
"""A function whose first argument has a known type, and which returns one tensor."""

First: TypeAlias = Literal[0]
No: TypeAlias = Literal[False]
"""Values of ``argnums`` and ``has_aux`` by which signatures tell results apart."""

Trees: TypeAlias = tuple[Tree, ...]


class SweepOptions(TypedDict, total=False):
    """What all Jacobians of functions take by keyword."""

    chunk_size: int | None
    memory: Memory
    out: Tree


def is_tensor(leaf: object) -> bool:
    """Is the leaf a tensor?"""
    return isinstance(leaf, torch.Tensor)


def is_differentiable(leaf: object) -> bool:
    """Is the leaf a floating or complex tensor? Every other leaf is a constant."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def product_dtype(*factors: Tensor) -> torch.dtype:
    """The dtype in which products of the factors are computed: the widest of theirs.

    On a CPU it is at least float32. There products in half precision take up to ten times as long,
    and each step of a sum is rounded.
    """
    return _product_dtype(frozenset([factor.dtype for factor in factors]), factors[0].is_cpu)


@cache
def _product_dtype(dtypes: frozenset[torch.dtype], is_cpu: bool) -> torch.dtype:
    dtype = reduce(torch.promote_types, dtypes)
    is_half = dtype.itemsize == 2 and dtype.is_floating_point
    return torch.float32 if is_half and is_cpu else dtype
