"""Rules for sums, products and quotients entry by entry, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from jacfunc.layers._forms import Rows, summed
from jacfunc.layers._rules import FormOf, rule

Value = TypeVar("Value")


def _both(*names: str) -> list[Callable[..., Any]]:
    """The functions and the methods of these names."""
    return [getattr(place, name) for name in names for place in (torch, Tensor)]


@rule(*_both("mul", "multiply"))
def product(input: Tensor, other: Any) -> Mapping[str, FormOf]:
    """``z = input · other``."""
    if not _are_real(input, other):
        return {}
    return {
        "input": lambda seeds: Rows.like(input, seeds * _expanded(other, seeds)),
        "other": lambda seeds: Rows.like(other, seeds * _expanded(input, seeds)),
    }


@rule(*_both("div", "divide", "true_divide"))
def quotient(input: Tensor, other: Any, rounding_mode: str | None = None) -> Mapping[str, FormOf]:
    """``z = input / other``."""
    if rounding_mode is not None or not _are_real(input, other):
        return {}

    def of_other(seeds: Tensor) -> Rows:
        below = _expanded(other, seeds)
        return Rows.like(other, -seeds * (_expanded(input, seeds) / below / below))

    return {
        "input": lambda seeds: Rows.like(input, seeds / _expanded(other, seeds)),
        "other": of_other,
    }


@rule(*_both("add"))
def total(input: Tensor, other: Any, alpha: float = 1) -> Mapping[str, FormOf]:
    """``z = input + alpha · other``."""
    if not _are_real(input, other, alpha):
        return {}
    return {
        "input": partial(Rows.like, input),
        "other": lambda seeds: Rows.like(other, seeds if alpha == 1 else alpha * seeds),
    }


@rule(Tensor.expand, Tensor.expand_as, *_both("broadcast_to"), rest="sizes")
def expanded(
    input: Tensor, sizes: tuple[Any, ...] = (), size: Any = None, implicit: bool = False
) -> Mapping[str, FormOf]:
    """``z = input``, with broadcasting."""
    return {"input": partial(Rows.like, input)}


@rule(Tensor.repeat, rest="sizes")
def repeated(input: Tensor, sizes: tuple[Any, ...]) -> Mapping[str, FormOf]:
    """``z = input``, so many times in each dimension."""
    shape = input.shape[1:]

    def form(seeds: Tensor) -> Rows:
        # how often can't be told from the arguments, where samples are repeated, too
        ones = (1,) * (seeds.dim() - 2 - len(shape)) + tuple(shape)
        pairs = zip(seeds.shape[2:], ones, strict=True)
        apart = [size for z, one in pairs for size in (z // max(one, 1), one)]
        total = seeds.reshape(*seeds.shape[:2], *apart).sum(tuple(range(2, 2 + len(apart), 2)))
        return Rows(total.reshape(*total.shape[:2], *shape))

    return {"input": form}


@rule(*_both("sub", "subtract"))
def difference(input: Tensor, other: Any, alpha: float = 1) -> Mapping[str, FormOf]:
    """``z = input − alpha · other``."""
    return total(input, other, -alpha)


@rule(*_both("addcmul"))
def total_of_product(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1
) -> Mapping[str, FormOf]:
    """``z = input + value · tensor1 · tensor2``."""
    if not _are_real(input, tensor1, tensor2, value):
        return {}
    return {
        "input": partial(Rows.like, input),
        "tensor1": lambda seeds: Rows.like(tensor1, value * seeds * _expanded(tensor2, seeds)),
        "tensor2": lambda seeds: Rows.like(tensor2, value * seeds * _expanded(tensor1, seeds)),
    }


@rule(*_both("prelu"))
def leaky(input: Tensor, weight: Tensor) -> Mapping[str, FormOf]:
    """``z = input`` if positive, else ``weight · input``, with a weight for all or each channel."""
    shape = weight.shape[1:]
    behind = input.dim() - 3 if weight[0].numel() > 1 else 0

    def of_weight(seeds: Tensor) -> Rows:
        below = seeds * torch.where(input > 0, 0, input)
        return Rows(summed(below, (*shape, *(1,) * behind)).reshape(*seeds.shape[:2], *shape))

    return {"weight": of_weight}


def _expanded(value: Value, seeds: Tensor) -> Value | Tensor:
    """A value ``[B, *shape]`` with as many dimensions as ``[B, *z]`` of the cotangents."""
    if not isinstance(value, Tensor):
        return value
    missing = seeds.dim() - 1 - value.dim()
    return value.reshape(len(value), *(1,) * missing, *value.shape[1:])


def _are_real(*values: Any) -> bool:
    """Are all values real? The rules do not conjugate, as complex values need."""
    return not any(
        value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)
        for value in values
    )
