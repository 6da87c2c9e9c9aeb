"""Checks that evaluations of one function agree, and that a product is another one's transpose."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from jacfunc._errors import Changes, Refused
from jacfunc._rounding import are_near
from jacfunc._torch import (
    below_transforms,
    holds_nan,
    inside_transform,
    outside_transforms,
    untracked,
)
from jacfunc._types import Leaves

CHANGING = (
    "its outputs change from one evaluation to the next, by random numbers that do not come from "
    "torch's default generators or by what it keeps from call to call, and it was evaluated "
    "several times for one result"
)

ROUNDING = 0.75
"""Evaluations may differ by this power of a dtype's precision, relative to the largest output: a
kernel may add up in the order in which threads come, and two evaluations may use two kernels.
"""

TRANSPOSE_ROUNDING = 0.4
"""An inner product errs by less than this power of a dtype's precision, relative to its terms."""


TERMS_AT_ONCE = 2**18
"""Terms of an inner product that exist at once."""


def check_agreement(
    outputs: Leaves, others: Leaves, same_way: bool = False, power: float = ROUNDING
) -> None:
    """Compare the outputs of two evaluations at one point.

    In float64 on a CPU, outputs that were evaluated in the same way must be equal bit by bit: those
    of a deterministic function are. Else they may differ by ``power`` of the precision. Inside
    transforms the numbers of all samples are compared.

    Raises:
        Changes: if the outputs differ.
    """
    if torch.compiler.is_compiling():
        return
    if not (inside_transform() or torch._C._len_torch_dispatch_stack()):
        is_same = _agree(outputs, others, same_way, power)
    else:
        with outside_transforms():
            is_same = _agree(outputs, others, same_way, power)
    if not is_same:
        raise Changes(CHANGING)


def differ_by_rounding(outputs: Leaves, others: Leaves) -> bool:
    """May outputs be zero but for rounding, as a gradient is at a minimum, and differ by that?"""
    if len(outputs) != len(others) or inside_transform():
        return False
    pairs = list(zip(outputs, others, strict=True))
    if any(x.shape != y.shape or not (_has_numbers(x) and _has_numbers(y)) for x, y in pairs):
        return False
    return all(bool(((x - y).abs() <= _precision((x,)) ** ROUNDING).all()) for x, y in pairs)


class Evaluations:
    """First outputs of each thing that is evaluated more than once, to compare later ones with."""

    def __init__(self) -> None:
        self._outputs: dict[Hashable, Leaves] = {}

    def check(self, what: Hashable, outputs: Leaves) -> None:
        """Compare outputs with those of the first evaluation of ``what``.

        Raises:
            Refused: if they differ.
        """
        first = self._outputs.get(what)
        if first is None:
            self._outputs[what] = detached(outputs)
        else:
            check_agreement(first, outputs)


def check_numbers(products: Leaves) -> Leaves:
    """The products of tangents, none of which may hold a nan.

    Raises:
        Refused: if one does. A zero tangent that meets an infinite derivative gives nan, and such
            a nan can't be told from one of the derivative itself.
    """
    if any(map(holds_nan, products)):
        raise Refused(
            "forward mode gives nan, which zero tangents and infinite derivatives may have made; "
            "use strategy=Reverse()"
        )
    return products


def detached(leaves: Leaves) -> Leaves:
    """The leaves without the graphs that they carry."""
    return tuple(map(Tensor.detach, leaves))


def check_transpose(
    cotangents: Leaves,
    products: Leaves,
    pulled: Leaves,
    tangents: Leaves,
    refusal: str,
    dtypes: Callable[[], set[torch.dtype]] = set,
) -> None:
    """Check ``⟨u, J v⟩ = ⟨Jᵀ u, v⟩``, for cotangents u and tangents v.

    Args:
        products: ``J v``.
        pulled: ``Jᵀ u``.
        refusal: what is wrong if the products differ.
        dtypes: finds others in which they were computed; asked only if they differ.

    Raises:
        Refused: if they do.
    """
    with torch.no_grad():
        left, right = _inner_product(cotangents, products), _inner_product(pulled, tangents)
    scale, error = left.norm + right.norm, abs(left.sum - right.sum)
    every = (*cotangents, *products, *tangents)
    if error <= scale * _precision(every) ** TRANSPOSE_ROUNDING:
        return
    if error > scale * _precision(every, dtypes()) ** TRANSPOSE_ROUNDING:
        raise Refused(refusal)


class _Terms(NamedTuple):
    """The sum of the terms of an inner product, and their norm."""

    sum: float
    norm: float


def _inner_product(lefts: Leaves, rights: Leaves) -> _Terms:
    """The inner product of all leaves, in single precision at least, some terms at a time."""
    total, squares, small = 0.0, 0.0, []
    for x, y in zip(lefts, rights, strict=True):
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.numel() <= TERMS_AT_ONCE:
            small.append((x.to(dtype) * y).flatten())
            continue
        count = max(1, TERMS_AT_ONCE * len(x) // x.numel())
        for rows, others in zip(x.split(count), y.split(count), strict=True):
            terms = rows.to(dtype) * others
            total += float(terms.sum())
            squares += float(terms.norm()) ** 2
    if small:
        terms = torch.cat(small)
        total, squares = total + float(terms.sum()), squares + float(terms.norm()) ** 2
    return _Terms(total, squares**0.5)


def _precision(leaves: Leaves, beside: Iterable[torch.dtype] = ()) -> float:
    """The coarsest precision that is computed with, autocast included."""
    dtypes = {leaf.dtype for leaf in leaves} | {d for d in beside if d.is_floating_point}
    for device in {leaf.device.type for leaf in leaves}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _agree(outputs: Leaves, others: Leaves, same_way: bool, power: float) -> bool:
    if len(outputs) != len(others):
        return False
    with untracked():
        return all(_agrees(x, y, same_way, power) for x, y in zip(outputs, others, strict=True))


def _agrees(output: Tensor, other: Tensor, same_way: bool, power: float) -> bool:
    if output.shape != other.shape or output.dtype != other.dtype:
        return False
    x, y = below_transforms(output), below_transforms(other)
    if x.shape != y.shape or not (_has_numbers(x) and _has_numbers(y)):
        return True  # vmap may put samples in another dimension, and fakes have no numbers
    is_exact = same_way and x.dtype == torch.float64 and x.device.type == "cpu"
    return are_near(x, y, None if is_exact else power)


def _has_numbers(tensor: Tensor) -> bool:
    """Can numbers of the tensor be read? Those of fakes can't, nor those in a CUDA graph."""
    if type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
