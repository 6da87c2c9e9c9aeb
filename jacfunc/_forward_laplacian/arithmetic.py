"""Rules of arithmetic: sums, products and quotients of entries; inverses and determinants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacfunc._forward_laplacian.jet import Args, Kwargs
from jacfunc._forward_laplacian.propagation import (
    Batched,
    Propagation,
    Rule,
    added_up,
    times,
    total,
)


@Batched
def mul(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The product rule, entry by entry: ``(ab)'' = a'' b + 2 a' b' + a b''``."""
    a, b = _two(args, kwargs)
    left, right = ctx.value(a), ctx.value(b)
    value = func(left, right)
    dim = value.dim()
    firsts, seconds = ctx.weighted(dim, (a, right), (b, left))
    if len(firsts) == 2:
        pair = ctx.aligned(a.first, dim) * ctx.aligned(b.first, dim)
        seconds.append(2 * ctx.summed(pair))
    return ctx.jet(value, added_up(firsts), total(*seconds))


@Batched
def div(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """From ``a = y b``: ``y' = (a' - y b') / b``, ``y'' = (a'' - y b'' - 2 y' b') / b``."""
    a, b = _two(args, kwargs)
    value = func(ctx.value(a), ctx.value(b))
    return quotient(ctx, value, a, b)


@Batched
def rdiv(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of ``number / jet``."""
    b, a = _two(args, kwargs)
    return quotient(ctx, func(ctx.value(b), ctx.value(a)), a, b)


def quotient(ctx: Propagation, value: Tensor, a: Any, b: Any) -> Any:
    """The jet of ``value = a / b``."""
    dim, divisor = value.dim(), ctx.value(b)
    first: Any = ctx.aligned(a.first, dim) if ctx.owns(a) else 0
    second: Any = None
    if ctx.owns(a) and a.second is not None:
        second = ctx.aligned_second(a.second, dim)
    if ctx.owns(b):
        slope = ctx.aligned(b.first, dim)
        first = (first - value * slope) / divisor
        bend = None if b.second is None else -value * ctx.aligned_second(b.second, dim)
        second = total(second, bend, -2 * ctx.summed(first * slope))
    else:
        first = first / divisor
    return ctx.jet(value, first, None if second is None else second / divisor)


def added(sign: float, is_reversed: bool = False) -> Rule:
    """The rule of ``a + alpha b``, or of ``a - alpha b``."""

    @Batched
    def rule(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
        named = dict(kwargs)
        alpha = named.pop("alpha", 1)
        a, b = _two(args, named)
        value = func(ctx.value(a), ctx.value(b), **({"alpha": alpha} if alpha != 1 else {}))
        if is_reversed:
            a, b = b, a
        firsts, seconds = ctx.weighted(value.dim(), (a, 1), (b, sign * alpha))
        if value.is_floating_point() and len(firsts) == 2:  # the sum has the shape of both
            shape = firsts[0].shape[:1] + value.shape
            firsts = [first.expand(shape) for first in firsts]
        return ctx.jet(value, added_up(firsts), total(*seconds))

    return rule


def _two(args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    """The two operands.

    Raises:
        NotImplementedError: if there are other arguments, such as a mode of rounding.
    """
    named = dict(kwargs)
    operands = [*args]
    operands += [named.pop(name) for name in ("input", "other") if name in named]
    if len(operands) != 2 or named:
        raise NotImplementedError("it has further arguments")
    return operands[0], operands[1]


def where(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of ``where(condition, a, b)``: constants have derivatives of zero."""
    if len(args) != 3 or kwargs:
        raise NotImplementedError("it has no two branches, or names its arguments")
    is_method = func is Tensor.where
    condition, a, b = (args[1], args[0], args[2]) if is_method else args
    value = func(*map(ctx.value, args))
    dim = value.dim()

    def chosen(name: str, align: Callable[[Tensor, int], Tensor]) -> Tensor | None:
        pair = [getattr(x, name) if ctx.owns(x) else None for x in (a, b)]
        if all(x is None for x in pair):
            return None
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        left, right = (zero if x is None else align(x, dim) for x in pair)
        return torch.where(condition, left, right)

    first = chosen("first", ctx.aligned)
    assert first is not None
    return ctx.jet(value, first, chosen("second", ctx.aligned_second))


def dropped(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of dropout: value and derivatives are multiplied by one mask."""
    jet: Any = args[0] if args else kwargs["input"]
    ones = torch.ones_like(jet.value)
    named = {name: value for name, value in kwargs.items() if name not in ("input", "inplace")}
    if kwargs.get("inplace", False) or (len(args) > 3 and args[3]):
        raise NotImplementedError("it writes into its input")
    mask = func(ones, *args[1:3], **named)
    second = times(mask, jet.second)
    return ctx.jet(jet.value * mask, jet.first * mask, second)


def slogdet(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``(log |det A|)' = tr A⁻¹A'``, ``'' = tr A⁻¹A'' - tr (A⁻¹A')²``; the sign is a constant."""
    (matrix,) = args or (kwargs["A"],)
    result = func(matrix.value)
    return type(result)((result[0].detach(), _logarithm(ctx, matrix, result[1])))


def logdet(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The logarithm of a determinant."""
    (matrix,) = args
    return _logarithm(ctx, matrix, func(matrix.value))


def _logarithm(ctx: Propagation, matrix: Any, value: Tensor) -> Any:
    inverse = torch.linalg.inv(matrix.value)
    turned = inverse @ matrix.first
    second = -ctx.summed((turned * turned.mT).sum((-2, -1)))
    if matrix.second is not None:
        second = second + _trace(inverse @ matrix.second)
    return ctx.jet(value, _trace(turned), second)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def inv(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """From ``A Y = 1``: ``Y' = -Y A' Y``, ``Y'' = -Y (A'' Y + 2 A' Y')``."""
    (matrix,) = args or (kwargs["A"],)
    inverse = func(matrix.value)
    first = -(inverse @ matrix.first @ inverse)
    bend = 2 * ctx.summed(matrix.first @ first)
    if matrix.second is not None:
        bend = bend + matrix.second @ inverse
    return ctx.jet(inverse, first, -(inverse @ bend))


def solve(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """From ``A X = B``: ``X' = A⁻¹ (B' - A' X)``, ``X'' = A⁻¹ (B'' - A'' X - 2 A' X')``."""
    if kwargs or len(args) != 2:
        raise NotImplementedError("it has further arguments")
    matrix, right = args
    a, b = ctx.value(matrix), ctx.value(right)
    value = func(a, b)
    is_vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    x = value.unsqueeze(-1) if is_vector else value
    inverse = torch.linalg.inv(a)

    def columns(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(-1) if is_vector else tensor

    first: Any = columns(right.first) if ctx.owns(right) else 0
    second: Any = 0
    if ctx.owns(right) and right.second is not None:
        second = columns(right.second)
    if ctx.owns(matrix):
        first = inverse @ (first - matrix.first @ x)
        second = second - 2 * ctx.summed(matrix.first @ first)
        if matrix.second is not None:
            second = second - matrix.second @ x
    else:
        first = inverse @ first
    bend = inverse @ second if isinstance(second, Tensor) else None
    if is_vector:
        first, bend = first.squeeze(-1), bend if bend is None else bend.squeeze(-1)
    return ctx.jet(value, first, bend)
