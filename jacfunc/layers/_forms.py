"""The forms that a parameter's Jacobian has at one use of it: three kinds of factors.

A form holds B samples and K cotangents of each. ``rows`` writes it out as the Jacobian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jacfunc._types import product_dtype

EVERY = slice(None)
"""All samples, or all cotangents."""

CACHED = 2**20
"""About as many bytes as a core's own caches hold; copies of more take up to twice as long."""


class Form(Protocol):
    """What one use of a parameter adds to its Jacobian ``J[b, k, *param]``."""

    def rows(self) -> Tensor:
        """The Jacobian written out, ``[B, K, *param]``."""
        ...

    def write(self, block: Tensor) -> None:
        """Write the rows into ``block``, which may be a part of a larger tensor."""
        ...


@dataclass(frozen=True)
class Outer:
    """``J[b, k, g, o, i] = Σₜ cotangents[k, b, g, t, o] · inputs[b, g, t, i]``.

    The form of linear layers, products and convolutions: the sum of an outer product at each of T
    positions.

    Args:
        inputs: inputs of the operation, ``[B, groups, T, I]``.
        cotangents: cotangents of its output, ``[K, B, groups, T, O]``.
        shape: the shape of the parameter, whose entries are in the order ``groups, O, I``.
        is_transposed: the entries of the parameter are in the order ``groups, I, O`` instead.

    Example:
        >>> import torch
        >>> from jacfunc.layers import Outer
        >>> inputs, cotangents = torch.ones(4, 1, 1, 3), torch.ones(2, 4, 1, 1, 5)
        >>> Outer(inputs, cotangents, torch.Size((5, 3))).rows().shape
        torch.Size([4, 2, 5, 3])
    """

    inputs: Tensor
    cotangents: Tensor
    shape: torch.Size
    is_transposed: bool = False

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.inputs.shape[1]

    @property
    def width(self) -> int:
        """The number I of inputs at a position."""
        return self.inputs.shape[-1]

    @property
    def order(self) -> tuple[int, int, int]:
        """The parameter's entries as ``[groups, O, I]``, or as ``[groups, I, O]``."""
        outs = self.cotangents.shape[-1]
        sides = (self.width, outs) if self.is_transposed else (outs, self.width)
        return self.groups, *sides

    def rows(self) -> Tensor:
        matrices = self.matrices()
        if self.is_transposed:
            matrices = matrices.transpose(-1, -2)
        dtype = torch.promote_types(self.cotangents.dtype, self.inputs.dtype)
        return matrices.reshape(*matrices.shape[:2], *self.shape).to(dtype)

    def matrices(self) -> Tensor:
        """The Jacobian as ``[B, K, groups, O, I]``, added up in the dtype of products."""
        num_seeds, size, groups, positions, outs = self.cotangents.shape
        if positions == 1:  # a single product is rounded once in any dtype
            matrices: Tensor = self.cotangents.transpose(0, 1).mT * self.inputs.unsqueeze(1)
            return matrices
        left, right = self.factors()
        by_group = left.permute(1, 2, 0, 4, 3).flatten(2, 3) @ right
        return by_group.view(size, groups, num_seeds, outs, right.shape[-1]).transpose(1, 2)

    def write(self, block: Tensor) -> None:
        left, right = self.cotangents, self.inputs
        groups, positions = left.shape[2:4]
        place = as_matrices(block, self.order)
        is_same = block.dtype == torch.promote_types(left.dtype, right.dtype)
        if place is None or not is_same or groups > 1 < positions:
            block.copy_(self.rows())
            return
        if self.is_transposed:
            place = place.transpose(-1, -2)
        if positions == 1:
            torch.mul(left.transpose(0, 1).transpose(-1, -2), right.unsqueeze(1), out=place)
            return
        left, right = self.factors()
        _write_products(left[:, :, 0].mT, right[:, 0], place[:, :, 0])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Cotangents and inputs in the dtype of products: autocast rounds the output of a layer."""
        dtype = product_dtype(self.cotangents, self.inputs)
        return self.cotangents.to(dtype), self.inputs.to(dtype)

    def of_samples(self, samples: slice, seeds: slice = EVERY) -> Outer:
        """The form of some of the samples, and of some cotangents of each."""
        cotangents = self.cotangents[seeds, samples]
        return Outer(self.inputs[samples], cotangents, self.shape, self.is_transposed)

    def beside(self, others: Sequence[Outer]) -> Outer:
        """One form with the positions of this one and of others of the same parameter."""
        uses = (self, *others)
        return Outer(
            torch.cat([use.inputs for use in uses], 2),
            torch.cat([use.cotangents for use in uses], 3),
            self.shape,
            self.is_transposed,
        )


@dataclass(frozen=True)
class Gather:
    """``J[b, k, index[b, t]] += cotangents[k, b, t]``: the form of lookups in a table.

    Args:
        index: the rows that are looked up, ``[B, T]``.
        cotangents: cotangents of these rows, ``[K, B, T, D]``.
        shape: the shape of the table, ``[V, D]``.

    Example:
        >>> from jacfunc.layers import Gather
        >>> form = Gather(torch.tensor([[0, 2]]), torch.ones(1, 1, 2, 3), torch.Size((4, 3)))
        >>> form.rows()[0, 0].sum(1)
        tensor([3., 0., 3., 0.])
    """

    index: Tensor
    cotangents: Tensor
    shape: torch.Size

    def rows(self) -> Tensor:
        num_seeds, size = self.cotangents.shape[:2]
        block = self.cotangents.new_zeros((size, num_seeds, *self.shape))
        return block.scatter_add(2, self._places(), self._by_sample())

    def write(self, block: Tensor) -> None:
        block.zero_().scatter_add_(2, self._places(), self._by_sample().to(block.dtype))

    def of_samples(self, samples: slice, seeds: slice = EVERY) -> Gather:
        """The form of some of the samples, and of some cotangents of each."""
        return Gather(self.index[samples], self.cotangents[seeds, samples], self.shape)

    def _by_sample(self) -> Tensor:
        return self.cotangents.transpose(0, 1)

    def _places(self) -> Tensor:
        """The row of the table that each entry of the cotangents belongs to, ``[B, K, T, D]``."""
        return self.index[:, None, :, None].expand(self._by_sample().shape)


@dataclass(frozen=True)
class Rows:
    """The Jacobian itself, ``[K, B, *param]``: for small parameters, and uses without a rule."""

    products: Tensor

    @classmethod
    def like(cls, param: Tensor, products: Tensor) -> Rows:
        """The form of a parameter ``[B, *shape]`` that was broadcast to z: products summed back."""
        return cls(summed(products, param.shape[1:]))

    def rows(self) -> Tensor:
        return self.products.transpose(0, 1)

    def write(self, block: Tensor) -> None:
        block.copy_(self.rows())

    def of_samples(self, samples: slice, seeds: slice = EVERY) -> Rows:
        """The form of some of the samples, and of some cotangents of each."""
        return Rows(self.products[seeds, samples])


def _write_products(left: Tensor, right: Tensor, place: Tensor) -> None:
    """``place[b, k] = left[k, b] @ right[b]``, of few samples at a time, which stay in the caches.

    Where the K places of a sample do not lie side by side, or are of another dtype, products are
    made elsewhere and copied.
    """
    (seeds, size), shape = left.shape[:2], place.shape[2:]
    lie_side_by_side = place.stride(1) == shape[0] * place.stride(2) and place.stride(3) == 1
    if place.dtype == right.dtype and lie_side_by_side:
        matrices = place.flatten(1, 2)
        for samples in _slices(size, size if right.is_cuda else _fitting(left[:, 0].nbytes)):
            torch.bmm(_side_by_side(left[:, samples]), right[samples], out=matrices[samples])
        return
    each = shape.numel() * right.element_size()
    at_once = 1 if right.is_cuda else min(seeds, _fitting(each))
    for samples in _slices(size, size if right.is_cuda else _fitting(at_once * each)):
        for some in _slices(seeds, at_once):
            products = torch.bmm(_side_by_side(left[some, samples]), right[samples])
            place[samples, some] = products.unflatten(1, (-1, shape[0]))


def _fitting(nbytes: int) -> int:
    """How many items of so many bytes the caches hold, at least one."""
    return max(1, CACHED // max(1, nbytes))


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def _side_by_side(left: Tensor) -> Tensor:
    """The K matrices of each sample as one: ``[K, B, O, T]`` to ``[B, K · O, T]``."""
    if left.stride(-1) == 1:
        return left.transpose(0, 1).flatten(1, 2)
    return left.permute(1, 3, 0, 2).flatten(2).mT


def as_matrices(block: Tensor, order: tuple[int, int, int]) -> Tensor | None:
    """A view ``[B, K, *order]`` of ``[B, K, *param]``; None if there is no such view."""
    if block.shape[2:] == order[1:] and order[0] == 1:
        return block.unsqueeze(2)
    try:
        return block.view(*block.shape[:2], *order)
    except RuntimeError:
        return None


def summed(products: Tensor, shape: Sequence[int]) -> Tensor:
    """``[K, B, *shape]``: products ``[K, B, *z]``, summed where shape was broadcast to z."""
    lead, sizes, shape = products.shape[:2], products.shape[2:], tuple(shape)
    if sizes == shape:
        return products
    if sizes[1:] == shape and sizes[0] == 1:  # faster than a sum of nothing
        return products.squeeze(2)
    ones = (1,) * (len(sizes) - len(shape))
    return products.sum_to_size(*lead, *ones, *shape).reshape(*lead, *shape)
