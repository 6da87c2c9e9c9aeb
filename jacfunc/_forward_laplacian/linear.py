"""Rules of linear maps, products and all else that is linear in each of its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._forward_laplacian.jet import Args, Kwargs, leaves_in
from jacfunc._forward_laplacian.propagation import Propagation, added_up, by_weight, total
from jacfunc._torch import fast_linear
from jacfunc._types import Leaves, is_differentiable


def multilinear(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The product rule: ``y' = Σᵢ g(xᵢ')``, ``y'' = Σᵢ g(xᵢ'') + 2 Σ_{i<j} g(xᵢ', xⱼ')``.

    A linear map of one jet is the case without a second sum. The map is linear in each jet, while
    the others have their values.
    """
    call = _Call(ctx, func, args, kwargs)
    value = call.outputs(*(jet.value for jet in call.jets))
    run = _linear_part(call)
    if len(call.jets) == 1:
        return _of_one(call, run, value)
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


def _of_one(call: _Call, run: _Call, values: Leaves) -> Any:
    """The jets of a linear map of one jet."""
    ctx, (jet,), linear_map = call.ctx, call.jets, run.outputs
    firsts: list[Tensor] = []

    def first(number: int) -> Tensor:
        if not firsts:
            firsts.extend(ctx.pushed(linear_map, jet.first))
        return firsts[number]

    seconds = None if jet.second is None else ctx.pushed_second(linear_map, jet.second)
    leaves = leaves_in((*run.args, *run.kwargs.values()))
    constants = [x for x in leaves if isinstance(x, Tensor) and not ctx.owns(x)]
    return call.contained(
        [
            ctx.jet(
                value,
                jet.later(partial(first, n), constants),
                None if seconds is None else seconds[n],
            )
            for n, value in enumerate(values)
        ]
    )


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
        args = [self._with(left, argument) for argument in self.args]
        if self.kwargs:
            named = {name: self._with(left, value) for name, value in self.kwargs.items()}
            result = self.func(*args, **named)
        else:
            result = self.func(*args)
        self.kind = type(result)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def _with(self, values: Iterator[Tensor], argument: Any) -> Any:
        """An argument with the next values in the places of jets."""
        if isinstance(argument, tuple | list):
            return type(argument)([self._with(values, x) for x in argument])
        if self.ctx.owns(argument):
            return next(values)
        if self.others is not None and is_differentiable(argument):
            return self.others(argument)
        return argument

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
            first = added_up([part[n] for part in firsts])
            jets.append(self.ctx.jet(value, first, total(*(part[n] for part in seconds))))
        return self.contained(jets)

    def contained(self, jets: list[Any]) -> Any:
        """The jets of the result in the container that it came in."""
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


@by_weight
def linear(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of ``F.linear``: all directions in one product, if the weight is a constant."""
    if not ctx.is_of_all:
        if len(args) == 3 and not kwargs and ctx.owns(args[2]):
            with ctx:
                return func(*args[:2]) + args[2]
        if kwargs or not args or not ctx.owns(args[0]) or ctx.jets(args[1:], {}):
            return multilinear(ctx, func, args, kwargs)
    x, weight = args[0], args[1]
    value = func(x.value, *args[1:])
    second = None if x.second is None else fast_linear(x.second, weight)
    first = x.later(lambda: fast_linear(x.first, weight), (weight,))
    return ctx.jet(value, first, second)


@by_weight
def matmul(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The rule of ``a @ b``: that of ``F.linear``, if one is a constant matrix or vector."""
    if not kwargs and len(args) == 2 and len(ctx.jets(args, {})) == 1:
        left, right = args
        if ctx.owns(left) and right.dim() <= 2:
            weight = right.mT if right.dim() == 2 else right
            return linear(ctx, F.linear, (left, weight), {})
        if ctx.owns(right) and left.dim() == 2 and right.value.dim() == 1:
            return linear(ctx, F.linear, (right, left), {})
    return multilinear(ctx, func, args, kwargs)


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
