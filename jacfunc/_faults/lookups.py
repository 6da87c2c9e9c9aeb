"""Calls that torch does wrong under vmap: lookups with padding or counts, and reads by strides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._errors import Refused
from jacfunc._torch import (
    below_transforms,
    has_strided_samples,
    inside_transform,
    is_batched,
    is_tracked,
)
from jacfunc._trees import flatten
from jacfunc._types import is_differentiable, is_tensor

Args: TypeAlias = tuple[Any, ...]


class Lookup(NamedTuple):
    """A lookup in a table, whose gradient leaves out the padding or is scaled by frequency."""

    table: Tensor
    indices: Tensor
    padding: int | None
    """The row that gets no gradient."""
    by_frequency: bool
    """Is a row's gradient divided by how often it is looked up?"""
    named: dict[str, Any]
    """All arguments but the padding, by name."""

    @property
    def is_padding(self) -> Tensor:
        """Which entries of the index are the padding."""
        assert self.padding is not None
        return self.indices == self.padding % self.table.shape[0]


def lookup(args: Args, kwargs: Mapping[str, Any]) -> Lookup | None:
    """Read the arguments of F.embedding or torch.embedding; None if the gradient is as usual."""
    is_below = "indices" in kwargs or is_differentiable(args[0] if args else None)
    named = dict(zip(_BELOW if is_below else _ABOVE, args, strict=False)) | dict(kwargs)
    padding = named.pop("padding_idx", None)
    if is_below and padding is not None and padding < 0:  # it means no padding there
        padding = None
    by_frequency = bool(named.get("scale_grad_by_freq"))
    if padding is None and not by_frequency:
        return None
    indices = named["indices" if is_below else "input"]
    return Lookup(named["weight"], indices, padding, by_frequency, named)


def embedding(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A lookup that is right under vmap.

    Torch's rule for vmap makes one lookup of all samples: then the padding is one row of all their
    tables, and rows are counted over all samples.
    """
    call = lookup(args, kwargs)
    if call is None or not (is_tracked_now(call.table) and is_batched(call.indices)):
        return func(*args, **kwargs)
    named = call.named
    if not is_batched(call.table):
        if not call.by_frequency:
            return func(*args, **kwargs)
        zero = (call.indices.sum() * 0).to(call.table.dtype)
        named = {**named, "weight": call.table + zero}  # each sample has its own table
    rows = func(**named)
    if call.padding is None:
        return rows
    return torch.where(call.is_padding.unsqueeze(-1), rows.detach(), rows)


def as_strided(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A read by strides; refused under vmap, where a sample may have other strides.

    Raises:
        Refused: if it would read other entries than without the transform.
    """
    if not torch.compiler.is_compiling() and any(
        map(has_strided_samples, tensors_of(args, kwargs))
    ):
        raise Refused("it reads memory by strides, which are others under vmap")
    if func in _RESHAPING and inside_transform():
        raise Refused("it changes the strides of a tensor in place, which transforms do not see")
    return func(*args, **kwargs)


def lies_alone(tensor: Tensor) -> bool:
    """Has the tensor its memory for itself, without overlaps? Then a copy has equal strides."""
    return _lie_alone([below_transforms(tensor)])[0]


def _lie_alone(tensors: Iterable[Tensor]) -> list[bool]:
    with torch._C.DisableTorchFunction():  # or it would count as a read by the user's function
        return [
            x.layout != torch.strided
            or (x.untyped_storage().nbytes() == x.nbytes and 0 not in x.stride())
            for x in tensors
        ]


def apart(tensors: Collection[Tensor]) -> list[Tensor]:
    """Copies without a graph, for which :func:`lies_alone` gives what it gives for the tensors.

    A function that reads memory by strides could read other entries of a copy. Where a tensor does
    not lie alone, such a function is refused, and so it must be with the copy.
    """
    copies = [tensor.detach().clone() for tensor in tensors]
    alone = _lie_alone(map(below_transforms, tensors) if inside_transform() else tensors)
    for number, copy in enumerate(copies):
        if not alone[number]:
            larger = copy.new_empty(copy.numel() + 1)  # so the copy does not lie alone
            copies[number] = larger.as_strided(copy.shape, copy.stride()).copy_(copy)
    return copies


def is_tracked_now(tensor: Tensor) -> bool:
    """Is the tensor differentiated here? False under a compiler, which can't tell."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and is_tracked(tensor)


def tensors_of(args: Args, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among arguments, and in the trees among them."""
    return list(filter(is_tensor, flatten((args, dict(kwargs)))[0]))


def is_plain_index(func: Callable[..., Any], args: Args) -> bool:
    """Is it an index without a mask, which takes as many entries whatever the numbers are?"""
    if func is not Tensor.__getitem__:
        return False
    return all(x.dtype not in (torch.bool, torch.uint8) for x in tensors_of(args[1:], {}))


def forms(name: str) -> list[Callable[..., Any]]:
    """All functions of this name; graphs of torch.fx call overloads."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    places = (torch, torch.special, Tensor)
    named = [getattr(place, name.removeprefix("special_"), None) for place in places]
    return [packet, *overloads, *filter(None, named)]


_ABOVE = (
    *("input", "weight", "padding_idx"),
    *("max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
_BELOW = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")

LOOKUPS = frozenset({F.embedding, *forms("embedding")})
_RESHAPING = frozenset(forms("as_strided_"))
STRIDING = frozenset(form for end in ("", "_", "_copy") for form in forms(f"as_strided{end}"))
"""Functions that read memory by strides, even beside a tensor's own entries."""
