"""Rules of softmax and its like, of extrema, and of powers and quotients of two numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacfunc._forward_laplacian.elementwise import FORMULAS, elementwise
from jacfunc._forward_laplacian.jet import Args, Kwargs
from jacfunc._forward_laplacian.propagation import Batched, Propagation, added_up

_POWER = elementwise(FORMULAS["pow"])


class _Exponentials:
    """A jet's softmax, with the derivatives of the logarithm of its sum of exponentials.

    With ``s`` the softmax, ``lse' = Σ s x'`` and ``lse'' = Σ s (x'' + (x' - lse')²)``.
    """

    def __init__(self, ctx: Propagation, x: Any, dim: Any, dtype: Any = None) -> None:
        if dtype is not None:
            with ctx:
                x = x.to(dtype)
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        behind = [d if d < 0 else d - x.value.dim() for d in dims] if x.value.dim() else []
        largest = x.value.amax(dims, keepdim=True).detach()
        powers = torch.exp(x.value - torch.where(largest.isfinite(), largest, 0.0))
        total_power = powers.sum(dims, keepdim=True)
        # where all numbers are minus infinity, torch's derivatives have zeros, and not 0 / 0
        self.softmax = powers / torch.where(total_power == 0, 1.0, total_power)
        self.first = (self.softmax * x.first).sum(behind, keepdim=True)
        self.beside = x.first - self.first
        squares = ctx.squares(self.beside)
        self.bend = squares if x.second is None else x.second + squares
        self.second = (self.softmax * self.bend).sum(behind, keepdim=True)


def _arguments(args: Args, kwargs: Kwargs) -> tuple[Any, Any, Any]:
    """Input, dimension and dtype."""
    named = dict(zip(("input", "dim", "dtype"), args, strict=False)) | dict(kwargs)
    if len(args) > 2 and isinstance(args[2], int):  # F.softmax has another one between
        named["dtype"] = args[3] if len(args) > 3 else None
    return named["input"], named["dim"], named.get("dtype")


def softmax(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``y' = y (x - lse)'``, ``y'' = y ((x - lse)'' + ((x - lse)')²)``."""
    x, dim, dtype = _arguments(args, kwargs)
    of = _Exponentials(ctx, x, dim, dtype)
    value = func(x.value, dim) if dtype is None else of.softmax
    return ctx.jet(value, of.softmax * of.beside, of.softmax * (of.bend - of.second))


def log_softmax(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The input less the logarithm of its sum of exponentials."""
    x, dim, dtype = _arguments(args, kwargs)
    of = _Exponentials(ctx, x, dim, dtype)
    second = -of.second if x.second is None else x.second - of.second
    return ctx.jet(func(x.value, dim, dtype=dtype), of.beside, second)


def logsumexp(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The logarithm of a sum of exponentials."""
    named = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | dict(kwargs)
    x, dim, keeps = named["input"], named["dim"], named.get("keepdim", False)
    of = _Exponentials(ctx, x, dim)
    value = func(x.value, dim, keepdim=True)
    jet = ctx.jet(value, of.first, of.second)
    if keeps:
        return jet
    with ctx:
        return jet.squeeze(dim)


def extreme(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The largest or smallest of all entries, or of two; equal ones share the derivative."""
    if len(args) == 2 and isinstance(args[1], Tensor) and not kwargs:
        return extreme_of_two(ctx, func, args, kwargs)
    if len(args) > 1 or kwargs:
        return extreme_along(ctx, func, args, kwargs)
    return extreme_values(ctx, func, args, kwargs)


def extreme_values(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``amax``, or ``max`` of all entries: equal ones share the derivative, as in torch."""
    named = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | dict(kwargs)
    x, dim = named["input"], named.get("dim", ())
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(x.value.dim()))
    every = x.value.amax(dims, keepdim=True) if _is_max(func) else x.value.amin(dims, keepdim=True)
    is_extreme = (x.value == every).to(x.value.dtype)
    share = is_extreme / is_extreme.sum(dims, keepdim=True)
    with ctx:
        # a value that rounding of a mean would change stays what it is
        jet: Any = (x * share).sum(dims, keepdim=named.get("keepdim", False))
    return ctx.jet(func(x.value, *args[1:], **kwargs), jet.first, jet.second)


def extreme_along(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``max`` along a dimension, ``sort`` or ``topk``: values are entries of the input."""
    x, *rest = args
    result = func(x.value, *rest, **kwargs)
    values, places = result
    named = dict(zip(_FURTHER[func.__name__], rest, strict=False)) | dict(kwargs)
    dim = named.get("dim", -1)
    is_kept = places.dim() == x.value.dim()
    index = places if is_kept else places.unsqueeze(dim)
    with ctx:
        taken: Any = torch.take_along_dim(x, index, dim)
        taken = taken if is_kept else taken.squeeze(dim)
    return type(result)((ctx.jet(values, taken.first, taken.second), places))


_FURTHER = {
    **dict.fromkeys(("max", "min"), ("dim", "keepdim")),
    "sort": ("dim", "descending", "stable"),
    "topk": ("k", "dim", "largest", "sorted"),
}
"""Further arguments of functions that return values and places."""


def extreme_of_two(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The larger or smaller of two entries; equal ones share the derivative, as in torch."""
    a, b = args
    left, right = ctx.value(a), ctx.value(b)
    value = func(left, right)
    is_left = left > right if _is_max(func) else left < right
    share = torch.where(left == right, 0.5, is_left.to(value.dtype))
    with ctx:
        jet: Any = a * share + b * (1 - share)
    return ctx.jet(value, jet.first, jet.second)


def _is_max(func: Any) -> bool:
    return "max" in func.__name__


@Batched
def power(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``base ** exponent``, where one of both is a constant."""
    if kwargs or len(args) != 2 or ctx.owns(args[0]):
        return _POWER(ctx, func, args, kwargs)
    base, exponent = args
    return _exponential(ctx, func(base, exponent.value), base, exponent)


def rpower(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``number ** jet``."""
    exponent, base = args
    return _exponential(ctx, func(exponent.value, base), base, exponent)


def _exponential(ctx: Propagation, value: Tensor, base: Any, exponent: Any) -> Any:
    """The jet of ``base ** exponent``; a power 0 of the base 0 has derivatives of 0."""
    number = torch.as_tensor(base, dtype=value.dtype, device=value.device)
    slope = torch.special.xlogy(value, number)
    pushed = ctx.aligned(exponent.first, value.dim())
    second = torch.special.xlogy(slope, number) * ctx.squares(pushed)
    if exponent.second is not None:
        second = second + slope * ctx.aligned_second(exponent.second, value.dim())
    return ctx.jet(value, slope * pushed, second)


def atan2(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The angle of a point: ``t' = (x y' - y x') / r²``, and ``t''`` of that quotient."""
    y, x = args
    value = func(ctx.value(y), ctx.value(x))
    with ctx:
        square = x * x + y * y
    firsts, seconds = ctx.weighted(value.dim(), (y, ctx.value(x)), (x, -ctx.value(y)))
    first = added_up(firsts) / square.value
    # the numerator's own derivative has products y' x' that cancel
    seconds.append(-ctx.summed(first * square.first))
    return ctx.jet(value, first, added_up(seconds) / square.value)
