"""What a user's tensors must be, so that a result can be written into them: checks of ``out=``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import unwrap
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._torch import inside_transform, memory_of
from jacfunc._trees import flatten
from jacfunc._types import Tree

AGAIN = "Pass what an earlier call returned."


def check_writable(api: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that would lose numbers of a result, or that torch does not write into.

    Raises:
        TypeError: for a dtype in which Jacobians have no digits.
        ValueError: for tensors with a graph, of another layout, or that share memory.
    """
    if any(tensor.requires_grad for tensor in tensors) or inside_transform():
        raise ValueError(
            f"{api}: out must be plain tensors outside all transforms, got one that requires grad "
            "or a call inside a transform. Leave out= away there."
        )
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(
                f"{api}: out must be real and floating point, got {tensor.dtype}, which would not "
                f"hold the numbers of a derivative. {AGAIN}"
            )
        if tensor.layout is not torch.strided or tensor.is_inference():
            what = "made in inference mode" if tensor.is_inference() else str(tensor.layout)
            raise ValueError(
                f"{api}: out must be dense tensors that can be written into, got one that is "
                f"{what}. {AGAIN}"
            )
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{api}: out must have a place for each entry, got the strides {tensor.stride()} "
                f"for the shape {tuple(tensor.shape)}, with which entries share one. {AGAIN}"
            )
    pairs = chain.from_iterable(combinations(near, 2) for near in _by_memory(tensors).values())
    if any(_meet(one, other) for one, other in pairs):
        raise ValueError(
            f"{api}: out must be tensors that do not share memory, got two that do. {AGAIN}"
        )


def read_by(func: Any, *arguments: Tree) -> list[Any]:
    """What a call reads, as far as that is known: arguments, and what a module has."""
    func = unwrap(func)
    own = [*func.parameters(), *func.buffers()] if isinstance(func, nn.Module) else []
    return [*flatten(arguments)[0], *own]


def check_unread(api: str, tensors: Sequence[Tensor], read: Iterable[object]) -> None:
    """Refuse to write into what a call reads: its arguments, parameters and buffers."""
    shared = _by_memory(tensors)
    for other in read:
        if not isinstance(other, Tensor) or other.layout is not torch.strided:
            continue
        near = shared.get(memory_of(other), [])
        if any(_meet(tensor, other) for tensor in near):
            raise ValueError(
                f"{api}: out must not be what the call reads, got an argument, a parameter or a "
                f"buffer of shape {tuple(other.shape)}. {AGAIN}"
            )


def check_holds_numbers(api: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor on the device ``"meta"`` for a result that has numbers."""
    if tensor.is_meta and device.type != "meta":
        raise ValueError(
            f"{api}: out must hold numbers, got a tensor on the device 'meta' for a result on "
            f"{device}. {AGAIN}"
        )


def check_target(api: str, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Refuse a dtype or a device that a result would lose its numbers in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"{api}: dtype must be real and floating point, got {dtype!r}. "
            "Derivatives have digits that others lose; convert the result if you want that."
        )
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        told = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{api}: device must be one that torch can use, got {device!r} ({told}). "
            "Write 'cpu', or leave it out."
        ) from error


def _overlaps_itself(tensor: Tensor) -> bool:
    """May two entries lie in one place?"""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += (size - 1) * stride
    return False


def _by_memory(tensors: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """The tensors, those together that have one storage."""
    shared: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        shared.setdefault(memory_of(tensor), []).append(tensor)
    return shared


def _meet(one: Tensor, other: Tensor) -> bool:
    """May two tensors of one storage have a byte in common?"""
    (start, stop), (begin, end) = _span(one), _span(other)
    return begin < stop and start < end and not _are_apart(one, other)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its memory, and the one after the last."""
    each = tensor.element_size()
    start = int(tensor.storage_offset()) * each
    if tensor.numel() == 0:
        return start, start
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return start, start + each * (1 + sum(stride * (size - 1) for stride, size in pairs))


def _are_apart(one: Tensor, other: Tensor) -> bool:
    """Has no entry of one a byte of the other? False where that can't be told from strides.

    Columns of one matrix lie in turns: they are told apart by where they are in each row.
    """
    pitches = {stride * x.element_size() for x in (one, other) for stride in x.stride()}
    for pitch in pitches - {0}:
        first, second = _within(one, pitch), _within(other, pitch)
        if first and second and (first[1] <= second[0] or second[1] <= first[0]):
            return True
    return False


def _within(tensor: Tensor, pitch: int) -> tuple[int, int] | None:
    """Which bytes of each row of ``pitch`` bytes a tensor has; None if it has no such rows."""
    each = tensor.element_size()
    start = int(tensor.storage_offset()) * each % pitch
    stop = start + each
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        if size > 1 and stride * each < pitch:
            stop += (size - 1) * stride * each
        elif size > 1 and stride * each % pitch:
            return None
    return (start, stop) if stop <= pitch else None
