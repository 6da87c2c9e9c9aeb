"""Operations of which each sample gets what it has given, whatever the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jacfunc._layouts.telling import functions_named

_OF_ENTRIES = functions_named(
    (
        *("to", "type_as", "bool", "long", "int", "float", "double", "half", "clone", "detach"),
        *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__"),
        *("__ge__", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and"),
        *("bitwise_or", "bitwise_xor", "bitwise_not", "__and__", "__or__", "__xor__", "__invert__"),
        *("__rand__", "__ror__", "add", "sub", "mul", "div", "neg", "rsub", "__add__", "__radd__"),
        *("__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__"),
        *("where", "masked_fill", "clamp", "abs", "sign", "minimum", "maximum"),
    )
)
_VIEWS = functions_named(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
        *("contiguous", "transpose", "permute", "repeat", "view_as"),
    )
)
_REDUCING = functions_named(("sum", "mean", "any", "all", "argmax", "argmin", "amax", "amin"))
_SUMMING = functions_named(("cumsum",))
_RUNNING = _SUMMING | {torch.diff, Tensor.diff}
_BY_SHAPE = _OF_ENTRIES | _VIEWS | _REDUCING

MOST_COMPARED = 2**8
"""So many numbers of each sample are looked at, to see that samples differ."""


def is_rowwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Has a result with samples in front, of tensors with samples in front, a row by each row?"""
    if func in _BY_SHAPE or func is torch.nn.functional.embedding:
        return True
    if func in _RUNNING and args:
        dim = kwargs.get("dim", args[1] if func in _SUMMING and len(args) > 1 else 0)
        return isinstance(dim, int) and dim % max(args[0].dim(), 1) != 0
    if func is not Tensor.__getitem__:
        return False
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    is_all = isinstance(items[0], slice) and items[0] == slice(None)
    return is_all or (items[0] is Ellipsis and not any(isinstance(x, Tensor | list) for x in items))


def differ(rows: Tensor) -> bool:
    """Is each row of a tensor another one, as far as the first numbers tell?"""
    numbers = rows.detach().flatten(1)[:, :MOST_COMPARED]
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers).flatten(1)
    return not rows.numel() or len(torch.unique(numbers.double(), dim=0)) == len(rows)


def are_equal(rows: Tensor) -> bool:
    """Are all rows of a tensor the same?"""
    return bool((rows == rows[:1]).all())
