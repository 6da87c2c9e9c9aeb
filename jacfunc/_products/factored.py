"""Products with the Jacobian of a batch from factors that are kept: no layer is passed through."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._factored import Part, as_known, place_of, placed
from jacfunc._types import Leaves, product_dtype
from jacfunc.layers import Gather, Outer, Rows

OwnedPart: TypeAlias = tuple[int, Part]
"""A part, and the number of its parameter."""

_ASKED: ContextVar[list[int] | None] = ContextVar("_ASKED", default=None)
"""How many products were taken from factors inside of :func:`from_factors`; None outside."""


@contextmanager
def from_factors() -> Iterator[list[int]]:
    """A context in which products with the matrix of a batch are taken from factors.

    It pays where many products are taken at one point. What it yields tells how many were taken.
    """
    token = _ASKED.set(asked := [0])
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def takes_factors() -> bool:
    """Is a product, which is asked for now, to be taken from factors?"""
    if (asked := _ASKED.get()) is None:
        return False
    asked[0] += 1
    return True


class FactoredProducts:
    """``J v`` and ``Jᵀ u`` from the parts of each parameter's J, which hold K rows of a sample.

    A product with a layer's weight takes two products of matrices of its own size and two with
    cotangents, ``[K, B, T, O]``; to pass tangents and cotangents through layers takes four.

    Args:
        parts: the parts of J, for each parameter.
        params: the parameters.
    """

    def __init__(self, parts: Sequence[Sequence[Part]], params: Leaves) -> None:
        self._params = params
        self._groups: dict[Hashable, tuple[Tensor, list[OwnedPart]]] = {}
        for number, of_param in enumerate(parts):
            for part in of_param:
                known, seeds = _known(part)
                # a weight and its bias have cotangents in common, which are read once
                self._groups.setdefault(place_of(seeds), (seeds, []))[1].append((number, known))

    def pushed(self, tangents: Leaves) -> Tensor:
        """``J v``, ``[K, B]``."""
        every = []
        for seeds, uses in self._groups.values():
            values = [_pushed(part, tangents[number], seeds) for number, part in uses]
            every.append((seeds * sum(values[1:], values[0])).flatten(2).sum(2))
        return sum(every[1:], every[0])

    def pulled(self, cotangents: Tensor) -> Leaves:
        """``Jᵀ u`` of one ``u [K, B]``."""
        products: dict[int, list[tuple[Part, Tensor]]] = {}
        for seeds, uses in self._groups.values():
            weights = cotangents.reshape(*cotangents.shape, *[1] * (seeds.dim() - 2))
            every = weights * seeds.to(product_dtype(seeds, weights))
            through = every[0] if len(every) == 1 else every.sum(0)
            for number, part in uses:
                products.setdefault(number, []).append((part, _pulled(part, through)))
        return tuple(
            _summed(products[number], param) if number in products else torch.zeros_like(param)
            for number, param in enumerate(self._params)
        )


def _known(part: Part) -> tuple[Part, Tensor]:
    """The part in one of three forms, and the cotangents in it: ``[K, B, …]``."""
    form = as_known(part.form)
    if isinstance(form, Rows):
        # with as many dimensions as cotangents of a layer, equal ones are found by their memory
        seeds = form.products.reshape(*form.products.shape[:2], 1, 1, -1)
        return Part(part.path, form), seeds
    return Part(part.path, form), form.cotangents


def _pushed(part: Part, tangent: Tensor, seeds: Tensor) -> Tensor:
    """What a tangent of the parameter adds to the operation's result, ``[B, …]``."""
    form = part.form
    for view in part.path:
        tangent = view(tangent)
    if isinstance(form, Gather):
        return tangent[form.index]
    if isinstance(form, Rows):
        return tangent.reshape(1, 1, 1, -1)
    assert isinstance(form, Outer)
    matrices = tangent.reshape(form.order[form.groups == 1 :])
    product = _by_groups(form.inputs) @ (matrices if form.is_transposed else matrices.mT)
    size, groups, positions, _ = form.inputs.shape
    if groups == 1:
        return product.view(size, 1, positions, -1)
    return product.view(groups, size, positions, -1).transpose(0, 1)


def _pulled(part: Part, through: Tensor) -> Tensor:
    """What a cotangent of the operation's result, ``[B, …]``, adds to the part's own."""
    form = part.form
    if isinstance(form, Gather):
        table = through.new_zeros(form.shape)
        return table.index_add(0, form.index.flatten(), through.flatten(0, 1))
    if isinstance(form, Rows):
        return through.sum(0).reshape(form.products.shape[2:])
    assert isinstance(form, Outer)
    left, right = _by_groups(through), _by_groups(form.inputs.to(through.dtype))
    if form.is_transposed:
        left, right = right, left
    return (left.mT @ right).reshape(form.shape)


def _by_groups(x: Tensor) -> Tensor:
    """Rows of all samples and positions ``[B, groups, T, I]``, as a matrix for each group."""
    if x.shape[1] == 1:
        return x.reshape(-1, x.shape[-1])
    return x.transpose(0, 1).flatten(1, 2)


def _summed(products: Sequence[tuple[Part, Tensor]], param: Tensor) -> Tensor:
    (part, product), *others = products
    total = placed(products, param) if others or part.path else product.reshape(param.shape)
    return total.to(param.dtype)
