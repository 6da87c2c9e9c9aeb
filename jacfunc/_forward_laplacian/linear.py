"""Rules of linear maps, products and all else that is linear in each of its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._forward_laplacian.jet import Args, Kwargs, Propagation, times, total
from jacfunc._types import Leaves, is_differentiable


def multilinear(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``y' = Σᵢ g(xᵢ')``, ``y'' = Σᵢ g(xᵢ'') + 2 Σ_{i<j} g(xᵢ', xⱼ')``: product rule, all else linear.

    A linear map of one jet is the case without a second sum. The map is linear in each jet, while
    the others have their values.
    """
    call = _Call(ctx, func, args, kwargs)
    value = call.outputs(*(jet.value for jet in call.jets))
    run = _linear_part(call)
    firsts, seconds = [], []
    for n, jet in enumerate(call.jets):
        at = run.through(n)
        firsts.append(ctx.pushed(at, jet.first))
        if jet.second is not None:
            seconds.append(ctx.pushed_second(at, jet.second))
    for n, m in combinations(range(len(call.jets)), 2):
        pair = ctx.pushed(run.through(n, m), call.jets[n].first, call.jets[m].first)
        seconds.append(tuple(2 * ctx.summed(product) for product in pair))
    return call.packed(value, firsts, seconds)


def jointly_linear(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of a map that is linear in all floating tensors at once, such as ``cat``."""
    call = _Call(ctx, func, args, kwargs, others=torch.zeros_like)
    own = _Call(ctx, func, args, kwargs)
    value = own.outputs(*(jet.value for jet in own.jets))
    firsts = [ctx.pushed(call.outputs, *(jet.first for jet in call.jets))]
    seconds = []
    if any(jet.second is not None for jet in call.jets):
        zeros = [jet.value if ctx.is_summed else jet.first for jet in call.jets]
        every = [
            torch.zeros_like(zero) if jet.second is None else jet.second
            for jet, zero in zip(call.jets, zeros, strict=True)
        ]
        seconds.append(ctx.pushed_second(call.outputs, *every))
    return own.packed(value, firsts, seconds)


class _Call:
    """A call with jets among its arguments, as a function of what stands in their places.

    Args:
        others: what is put in the place of other floating tensors; they stay if it is None.
    """

    def __init__(
        self,
        ctx: Propagation,
        func: Any,
        args: Args,
        kwargs: Kwargs,
        others: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.ctx, self.func, self.others = ctx, func, others
        self.args, self.kwargs = args, kwargs
        self.jets = ctx.jets(args, kwargs)
        self.kind: Any = None

    def outputs(self, *values: Tensor) -> Leaves:
        """What the function returns for these values in the places of jets, as a tuple."""
        left = iter(values)

        def put(argument: Any) -> Any:
            if isinstance(argument, tuple | list):
                return type(argument)([put(x) for x in argument])
            if self.ctx.owns(argument):
                return next(left)
            if self.others is not None and is_differentiable(argument):
                return self.others(argument)
            return argument

        args = [put(argument) for argument in self.args]
        result = self.func(*args, **{name: put(value) for name, value in self.kwargs.items()})
        self.kind = type(result)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def through(self, *numbers: int) -> Callable[..., Leaves]:
        """The call as a function of some of its jets, while the others have their values."""

        def of(*seeds: Tensor) -> Leaves:
            values = [jet.value for jet in self.jets]
            for number, seed in zip(numbers, seeds, strict=True):
                values[number] = seed
            return self.outputs(*values)

        return of

    def packed(self, values: Leaves, firsts: Sequence[Leaves], seconds: Sequence[Leaves]) -> Any:
        """The jets of the result, from parts that add up, in the container that it came in."""
        jets = []
        for n, value in enumerate(values):
            first = total(*(part[n] for part in firsts))
            assert first is not None
            jets.append(self.ctx.jet(value, first, total(*(part[n] for part in seconds))))
        return jets[0] if issubclass(self.kind, Tensor) else self.kind(jets)


_ADDED = {"bias": None, "value": 0.0}
"""Arguments that are added to a linear map, and what stands for them in the map alone."""

_ADDED_AT: dict[Callable[..., Any], int] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), 2),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 2),
    **dict.fromkeys((F.bilinear, F.pad), 3),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), 2),
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), 2),
}


def _linear_part(call: _Call) -> _Call:
    """The call without what it adds, and of reshaping instead of viewing: tangents may be spread.

    Raises:
        NotImplementedError: if what is added has derivatives.
    """
    func = Tensor.reshape if call.func is Tensor.view else call.func
    args, kwargs, at = list(call.args), dict(call.kwargs), _ADDED_AT.get(call.func)
    if at is not None:
        added = [args[at : at + 1], *([kwargs[name]] for name in _ADDED if name in kwargs)]
        if call.ctx.jets(tuple(added), {}):
            raise NotImplementedError("what it adds depends on the inputs")
        if len(args) > at:
            args[at] = 0.0 if isinstance(args[at], int | float) else _zero_or_none(args[at])
        kwargs |= {name: none for name, none in _ADDED.items() if name in kwargs}
    return _Call(call.ctx, func, tuple(args), kwargs)


def _zero_or_none(added: Any) -> Any:
    """No bias; or, for a number in a tensor, such as masked_fill takes, zero."""
    is_number = isinstance(added, Tensor) and added.dim() == 0
    return torch.zeros_like(added) if is_number else None


def linear(
    ctx: Propagation, func: Any, args: Args, kwargs: Kwargs
) -> Any:
    """The rule of ``F.linear``: all directions in one product, if the weight is a constant."""
    if kwargs or not args or not ctx.owns(args[0]) or ctx.jets(args[1:], {}):
        return multilinear(ctx, func, args, kwargs)
    x, weight = args[0], args[1]
    value = func(x.value, *args[1:])
    second = None if x.second is None else F.linear(x.second, weight)
    return ctx.jet(value, F.linear(x.first, weight), second)


def matmul(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of ``a @ b``: all directions in one product, if a matrix or vector is a constant."""
    if kwargs or len(args) != 2 or len(ctx.jets(args, {})) != 1:
        return multilinear(ctx, func, args, kwargs)
    a, b = args
    product: Callable[[Tensor], Tensor] | None = None
    if ctx.owns(a) and b.dim() <= 2:
        jet, product = a, lambda x: x @ b
    elif ctx.owns(b) and b.dim() == 1 and a.dim() <= 2:
        jet, product = b, lambda x: x @ a.mT if a.dim() == 2 else x @ a
    if product is None or jet.value.dim() == 0:
        return multilinear(ctx, func, args, kwargs)
    second = None if jet.second is None else product(jet.second)
    return ctx.jet(func(*map(ctx.value, args)), product(jet.first), second)


def mul(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The product rule, entry by entry: ``(ab)'' = a'' b + 2 a' b' + a b''``."""
    a, b = _two(args, kwargs)
    value = func(ctx.value(a), ctx.value(b))
    dim = value.dim()
    parts, seconds = [], []
    for jet, other in ((a, b), (b, a)):
        if ctx.owns(jet):
            factor = ctx.value(other)
            parts.append(ctx.aligned(jet.first, dim) * factor)
            if jet.second is not None:
                seconds.append(factor * ctx.aligned_second(jet.second, dim))
    if len(parts) == 2:
        pair = ctx.aligned(a.first, dim) * ctx.aligned(b.first, dim)
        seconds.append(2 * ctx.summed(pair))
    first = total(*parts)
    assert first is not None
    return ctx.jet(value, first, total(*seconds))


def div(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Of ``a = y b``: ``y' = (a' - y b') / b``, ``y'' = (a'' - y b'' - 2 y' b') / b``."""
    a, b = _two(args, kwargs)
    value = func(ctx.value(a), ctx.value(b))
    return quotient(ctx, value, a, b)


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


def added(sign: float, is_reversed: bool = False) -> Any:
    """The rule of ``a + alpha b``, or of ``a - alpha b``."""

    def rule(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
        named = dict(kwargs)
        alpha = named.pop("alpha", 1)
        a, b = _two(args, named)
        value = func(ctx.value(a), ctx.value(b), **({"alpha": alpha} if alpha != 1 else {}))
        if is_reversed:
            a, b = b, a
        dim, firsts, seconds = value.dim(), [], []
        for jet, factor in ((a, 1), (b, sign * alpha)):
            if ctx.owns(jet):
                firsts.append(_scaled(factor, ctx.aligned(jet.first, dim)))
                if jet.second is not None:
                    seconds.append(_scaled(factor, ctx.aligned_second(jet.second, dim)))
        if value.is_floating_point() and len(firsts) == 2:  # the sum has the shape of both
            shape = firsts[0].shape[:1] + value.shape
            firsts = [first.expand(shape) for first in firsts]
        first = total(*firsts)
        assert first is not None
        return ctx.jet(value, first, total(*seconds))

    return rule


def _scaled(factor: float, tensor: Tensor) -> Tensor:
    return tensor if factor == 1 else factor * tensor


def _two(args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    """The two operands.

    Raises:
        NotImplementedError: if there are other arguments, such as a mode of rounding.
    """
    named = dict(kwargs)
    operands = [*args]
    for name in ("input", "other"):
        if name in named:
            operands.append(named.pop(name))
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
        return torch.where(condition, *(zero if x is None else align(x, dim) for x in pair))

    first = chosen("first", ctx.aligned)
    assert first is not None
    return ctx.jet(value, first, chosen("second", ctx.aligned_second))


def converted(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of a change of dtype, device or layout, or of one to the likes of another tensor."""
    jet, *rest = args
    others = tuple(map(ctx.value, rest))
    value = func(jet.value, *others, **kwargs)
    if value.is_complex():
        raise NotImplementedError("it makes complex numbers")
    if not value.is_floating_point():
        return value
    second = None if jet.second is None else jet.second.to(value.device, value.dtype)
    return ctx.jet(value, jet.first.to(value.device, value.dtype), second)


def like_another(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of a linear map of the first argument, which another one gives its shape."""
    if not ctx.owns(args[0]):
        return func(*map(ctx.value, args), **kwargs)
    return multilinear(ctx, func, (args[0], *map(ctx.value, args[1:])), kwargs)


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
