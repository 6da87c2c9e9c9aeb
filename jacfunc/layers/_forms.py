"""What a use of a parameter contributes to its Jacobian, kept as factors.

Of B samples and K cotangents each; ``rows`` is what it would be written out. Three forms suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CACHED = 2**20
"""Bytes that a core's own caches hold, about; of more, a copy takes up to twice as long."""


class Form(Protocol):
    """One use's part of ``J[b, k, *param]``."""

    def rows(self) -> Tensor:
        """Written out, ``[B, K, *param]``."""
        ...

    def write(self, block: Tensor) -> None:
        """The same into ``block``, which may be a part of a larger tensor."""
        ...


@dataclass(frozen=True)
class Outer:
    """``J[b, k, g, o, i] = Σₜ cotangents[k, b, g, t, o] · inputs[b, g, t, i]``.

    Linear layers, products and convolutions: T positions, at each an outer product.

    Args:
        inputs: ``[B, groups, T, I]``.
        cotangents: of what came out, ``[K, B, groups, T, O]``.
        shape: of the parameter: ``groups · O · I`` entries in this order.
        is_turned: the parameter has its inputs before its outputs, in the order g, i, o.
    """

    inputs: Tensor
    cotangents: Tensor
    shape: torch.Size
    is_turned: bool = False

    @property
    def groups(self) -> int:
        return self.inputs.shape[1]

    @property
    def width(self) -> int:
        """Inputs at a position."""
        return self.inputs.shape[-1]

    def rows(self) -> Tensor:
        left, right = self._factors()
        found = torch.einsum("kbgto,bgti->bkgoi", left, right)
        if self.is_turned:
            found = found.transpose(-1, -2)
        return found.reshape(*found.shape[:2], *self.shape)

    def write(self, block: Tensor) -> None:
        left, right = self._factors()
        (groups, positions, outs), ins = left.shape[2:], right.shape[-1]
        order = (groups, ins, outs) if self.is_turned else (groups, outs, ins)
        place = as_matrices(block, order)
        if place is None or block.dtype != left.dtype or groups > 1 < positions:
            block.copy_(self.rows())
            return
        if self.is_turned:
            place = place.transpose(-1, -2)
        if positions == 1:
            torch.mul(left.transpose(0, 1).transpose(-1, -2), right.unsqueeze(1), out=place)
            return
        _write_products(left[:, :, 0].mT, right[:, 0], place[:, :, 0])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """In the wider dtype: autocast rounds what comes out of a layer."""
        dtype = torch.promote_types(self.cotangents.dtype, self.inputs.dtype)
        return self.cotangents.to(dtype), self.inputs.to(dtype)

    def of_samples(self, some: slice) -> Outer:
        """Of these alone."""
        return Outer(self.inputs[some], self.cotangents[:, some], self.shape, self.is_turned)

    def beside(self, others: Sequence[Outer]) -> Outer:
        """Several uses of one matrix as one, with all their positions."""
        every = (self, *others)
        return Outer(
            torch.cat([use.inputs for use in every], 2),
            torch.cat([use.cotangents for use in every], 3),
            self.shape,
            self.is_turned,
        )


@dataclass(frozen=True)
class Gather:
    """``J[b, k, index[b, t]] += cotangents[k, b, t]``: rows of a table.

    Args:
        index: ``[B, T]``.
        cotangents: ``[K, B, T, D]``.
        shape: of the table, ``[V, D]``.
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

    def _by_sample(self) -> Tensor:
        return self.cotangents.transpose(0, 1)

    def _places(self) -> Tensor:
        """The row of each entry of the cotangents."""
        return self.index[:, None, :, None].expand(self._by_sample().shape)


@dataclass(frozen=True)
class Rows:
    """Rows as they are, ``[K, B, *param]``: small parameters, and what no rule covers."""

    products: Tensor

    def rows(self) -> Tensor:
        return self.products.transpose(0, 1)

    def write(self, block: Tensor) -> None:
        block.copy_(self.rows())


def _write_products(left: Tensor, right: Tensor, place: Tensor) -> None:
    """``place[b, k] = left[k, b] @ right[b]``.

    BLAS takes a batch only where what comes out lies side by side, which a place need not; what
    is copied from there, some samples at a time, is still in the caches.
    """
    size, shape = len(right), place.shape[2:]
    nbytes = size * shape.numel() * right.element_size()
    step = size if right.is_cuda else -(-size // max(1, round(nbytes / CACHED)))
    products = right.new_empty((step, *shape))
    for start in range(0, size, step):
        some = slice(start, start + step)
        factors, inputs = left[:, some], right[some]
        for k, factor in enumerate(factors):
            place[some, k] = torch.bmm(factor, inputs, out=products[: len(inputs)])


def as_matrices(block: Tensor, order: tuple[int, int, int]) -> Tensor | None:
    """``[B, K, *param]`` seen as ``[B, K, *order]``; None where that takes a copy."""
    try:
        return block.view(*block.shape[:2], *order)
    except RuntimeError:
        return None


def summed(products: Tensor, shape: Sequence[int]) -> Tensor:
    """``[K, B, *z]`` summed over what a parameter of this shape was broadcast along."""
    lead = products.dim() - len(shape)
    spread = [
        n
        for n, size in enumerate(products.shape)
        if n > 1 != size and (n < lead or shape[n - lead] == 1)
    ]
    products = products.sum(spread, keepdim=True) if spread else products
    return products.reshape(*products.shape[:2], *shape)
