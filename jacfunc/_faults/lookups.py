"""Calls that torch misreads under vmap: lookups with a gradient of their own, reads by strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A lookup in a table whose gradient is not that of any lookup."""

    table: Tensor
    indices: Tensor
    padding: int | None
    """Its row gets no gradient."""
    by_frequency: bool
    """Is a row's gradient divided by how often it is looked up?"""
    named: dict[str, Any]
    """All arguments but the padding, by name."""

    @property
    def is_padding(self) -> Tensor:
        """Which entries of the index look the padding up."""
        assert self.padding is not None
        return self.indices == self.padding % self.table.shape[0]


def lookup(args: Args, kwargs: Mapping[str, Any]) -> Lookup | None:
    """From the arguments of torch.nn.functional.embedding, or of torch.embedding below it."""
    is_below = "indices" in kwargs or is_differentiable(args[0] if args else None)
    named = dict(zip(_BELOW if is_below else _ABOVE, args, strict=False)) | dict(kwargs)
    padding = named.pop("padding_idx", None)
    if is_below and padding is not None and padding < 0:  # there it means that there is none
        padding = None
    by_frequency = bool(named.get("scale_grad_by_freq"))
    if padding is None and not by_frequency:
        return None
    indices = named["indices" if is_below else "input"]
    return Lookup(named["weight"], indices, padding, by_frequency, named)


def embedding(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Under vmap by what vmap is right in: its own rule puts all lookups into one.

    Then one row of all samples' tables is the padding, and rows are counted over all samples.
    """
    found = lookup(args, kwargs)
    if found is None or not (is_tracked_now(found.table) and is_batched(found.indices)):
        return func(*args, **kwargs)
    named = found.named
    if not is_batched(found.table):
        if not found.by_frequency:
            return func(*args, **kwargs)
        apart = (found.indices.sum() * 0).to(found.table.dtype)
        named = {**named, "weight": found.table + apart}  # of each sample its own
    rows = func(**named)
    if found.padding is None:
        return rows
    return torch.where(found.is_padding.unsqueeze(-1), rows.detach(), rows)


def as_strided(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Refused under vmap, where a sample may not lie as it would alone: in a row."""
    if not torch.compiler.is_compiling() and any(
        map(has_strided_samples, tensors_of(args, kwargs))
    ):
        raise Refused("it reads memory by strides, which are others under vmap")
    if func in _RESHAPING and inside_transform():
        raise Refused("it changes the strides of a tensor in place, which transforms do not see")
    return func(*args, **kwargs)


def lies_alone(tensor: Tensor) -> bool:
    """Is the memory all its own, each entry at one place? Then a copy has the strides it has."""
    tensor = below_transforms(tensor)
    if tensor.layout != torch.strided:
        return True
    return tensor.untyped_storage().nbytes() == tensor.nbytes and 0 not in tensor.stride()


def apart(tensor: Tensor) -> Tensor:
    """A copy without a graph, which lies alone only if the tensor does.

    A function that reads memory by strides would read the right entries of a copy in the wrong
    order: it is refused where it meets a tensor that does not lie alone.
    """
    copy = tensor.detach().clone()
    if lies_alone(tensor):
        return copy
    spare = copy.new_empty(copy.numel() + 1)  # larger than the copy: it does not lie alone
    return spare.as_strided(copy.shape, copy.stride()).copy_(copy)


def is_tracked_now(tensor: Tensor) -> bool:
    """Compilers can't be asked."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and is_tracked(tensor)


def tensors_of(args: Args, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return list(filter(is_tensor, flatten((args, dict(kwargs)))[0]))


def forms(name: str) -> list[Callable[..., Any]]:
    """What is met when it is called by this name; graphs of torch.fx call overloads."""
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
"""What reads memory wherever it lies, be it beside a tensor's own entries."""
