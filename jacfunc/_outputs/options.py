"""What users pass as ``outputs=``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._outputs.by_value import ByValue, Sampled, TopK
from jacfunc._outputs.call import Asked
from jacfunc._outputs.choice import OutputChoice, OwnNumbers, SharedNumbers
from jacfunc._outputs.cotangents import OwnCotangents
from jacfunc._torch import inside_transform
from jacfunc._trees import flatten

Outputs: TypeAlias = (
    Sequence[int] | slice | Tensor | TopK | Sampled | Sequence[Tensor] | Mapping[str, Any] | None
)
"""Numbers, a slice, the largest, some at random, or cotangents, as a tensor or a tree."""


def choice_of(api: str, outputs: Any, is_of_one: bool = True) -> Asked | None:
    """What a user asks for, with copies of tensors: the door's function may be called much later.

    Args:
        is_of_one: is it asked of one batch? Of several nothing can be each sample's own.

    Raises:
        TypeError, ValueError: if it says nothing of outputs.
    """
    if outputs is None or isinstance(outputs, OutputChoice | ByValue):
        return outputs
    if isinstance(outputs, slice):
        return _sliced(api, outputs)
    if isinstance(outputs, Tensor) and not outputs.is_floating_point():
        return _numbered(api, outputs, is_of_one)
    if isinstance(outputs, Sequence) and outputs and all(map(_is_number, outputs)):
        return SharedNumbers(tuple(map(int, outputs)))
    return _cotangents(api, outputs, is_of_one)


def of_many(asked: Asked | None) -> Asked | None:
    """The choice for several batches, of which no tensor may hold something for each sample."""
    if isinstance(asked, OwnNumbers | OwnCotangents):
        return replace(asked, is_of_one=False)
    return asked


def _is_number(value: object) -> bool:
    """Is it a whole number, of Python or of NumPy?"""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _sliced(api: str, outputs: slice) -> SharedNumbers:
    parts = outputs.start, outputs.stop, outputs.step
    try:
        plain = slice(*(None if part is None else index(part) for part in parts))
        range(1)[plain]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{api}: outputs must be a slice of whole numbers, got {outputs} ({error}). Write "
            "slice(0, 5) for the first five."
        ) from error
    return SharedNumbers(plain)


def _numbered(api: str, outputs: Tensor, is_of_one: bool) -> Asked:
    is_whole = not (outputs.is_complex() or outputs.dtype is torch.bool)
    if not is_whole or outputs.layout is not torch.strided or outputs.is_quantized:
        raise TypeError(
            f"{api}: outputs must be numbers or cotangents, got a tensor of {outputs.dtype}. Pass "
            "integers, of a mask mask.nonzero().squeeze(1), or floating point cotangents."
        )
    if outputs.dim() not in (1, 2) or not outputs.numel() or outputs.is_meta:
        raise ValueError(
            f"{api}: outputs must be numbers [R], or [B, R] of each sample's own, got shape "
            f"{tuple(outputs.shape)} on {outputs.device}. Pass at least one number."
        )
    if inside_transform():  # numbers can't be read there
        return OwnNumbers(outputs.detach().long().clone(), None, is_of_one)
    if outputs.dim() == 1:
        return SharedNumbers(tuple(outputs.tolist()))
    least, largest = outputs.aminmax()
    return OwnNumbers(outputs.long().clone(), (int(least), int(largest)), is_of_one)


def _cotangents(api: str, outputs: Any, is_of_one: bool) -> OwnCotangents:
    leaves, spec = flatten(outputs)
    plain = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
    if not (leaves and all(plain)):
        got = outputs.__name__ if isinstance(outputs, type) else type(outputs).__name__
        raise TypeError(
            f"{api}: outputs must be numbers, a slice, TopK(k), Sampled(k) or cotangents, got "
            f"{got}. Write [0, 3] for two rows, or TopK(5) for the largest outputs."
        )
    if any(x.layout is not torch.strided or x.is_meta or not x.numel() for x in leaves):
        raise ValueError(
            f"{api}: outputs must be dense cotangents with numbers, got "
            f"{', '.join(f'{tuple(x.shape)} {x.layout} on {x.device}' for x in leaves)}. Pass "
            "[R, *out], or [B, R, *out] of each sample's own."
        )
    return OwnCotangents(tuple([x.detach().clone() for x in leaves]), spec, is_of_one)
