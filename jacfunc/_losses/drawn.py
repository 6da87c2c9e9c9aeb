"""Gradients of log likelihoods at drawn targets: columns of a root of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._losses.formulas import AT_ONCE, row_pieces
from jacfunc._types import Leaves, product_dtype


@dataclass(frozen=True)
class Draws:
    """Targets that were drawn, for each leaf of the outputs."""

    parts: tuple[ColumnsAt, ...]

    def at(self, leaves: Leaves) -> Drawn:
        """Their gradients at the outputs."""
        pairs = zip(self.parts, leaves, strict=True)
        return Drawn(tuple(columns_at(leaf) for columns_at, leaf in pairs))


@dataclass(frozen=True)
class Drawn:
    """``H = S Sᵀ`` with a column for each draw of each sample: the gradient of ``-log p`` there."""

    parts: tuple[Columns, ...]

    @property
    def roots(self) -> Leaves:
        """The gradients, ``[R, B, *out]``."""
        return tuple(part.dense() for part in self.parts)

    def times(self, tangents: Leaves) -> Leaves:
        """``H u = S (Sᵀ u)``, ``[B, *out]``."""
        pairs = zip(self.parts, tangents, strict=True)
        along = sum(part.dot(u) for part, u in pairs)
        assert isinstance(along, Tensor)
        return tuple(part.combined(along) for part in self.parts)

    def times_batch(self, tangents: Leaves) -> Leaves:
        """``H u`` of K vectors, ``[K, B, *out]``."""
        products = [self.times(tuple(u[k] for u in tangents)) for k in range(len(tangents[0]))]
        return tuple(map(torch.stack, zip(*products, strict=True)))


@dataclass(frozen=True)
class DenseColumns:
    """Gradients ``[R, B, *out]`` that are written out."""

    gradients: Tensor

    def dense(self) -> Tensor:
        """``[R, B, *out]``."""
        return self.gradients

    def dot(self, vector: Tensor) -> Tensor:
        """``Sᵀ u``, ``[B, *out]`` → ``[R, B]``."""
        return torch.cat([_in_rows(part * vector).sum(2) for part in self._pieces(self.gradients)])

    def combined(self, factors: Tensor) -> Tensor:
        """``S a``, ``[R, B]`` → ``[B, *out]``."""
        total = torch.zeros_like(self.gradients[0])
        factors = factors.view(*factors.shape, *(1,) * (total.dim() - 1)).to(total.dtype)
        for part, weights in zip(self._pieces(self.gradients), self._pieces(factors), strict=True):
            total += (part * weights).sum(0)
        return total

    def _pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor, some draws after the other."""
        yield from tensor.split(max(1, AT_ONCE // max(1, self.gradients[0].numel())))


@dataclass(frozen=True)
class ClassColumns:
    """Gradients ``scale · (p - onehot)`` of logits, of which the drawn classes alone are kept.

    Args:
        logits: ``[B, …, C]``, with the classes behind.
        classes: ``[B, …, R]``.
        dim: in which dimension the outputs ``[B, *out]`` have the classes.
    """

    logits: Tensor
    classes: Tensor
    scale: float
    dim: int = -1

    def dense(self) -> Tensor:
        chances, draws = self.logits.softmax(-1), self.classes.movedim(-1, 0).unsqueeze(-1)
        every = chances.mul_(self.scale).expand(len(draws), *chances.shape)
        every = every.clone() if len(draws) > 1 else every
        every.scatter_add_(-1, draws, every.new_tensor(-self.scale).expand(draws.shape))
        return every.movedim(-1, self.dim % self.logits.dim() + 1)

    def dot(self, vector: Tensor) -> Tensor:
        vector, dtype = vector.movedim(self.dim, -1), product_dtype(self.logits)
        means = self.logits.new_empty((*self.logits.shape[:-1], 1), dtype=dtype)
        for logits, part, into in row_pieces(-1, self.logits, vector, means):
            into.copy_(logits.softmax(-1, dtype=dtype).mul_(part).sum(-1, keepdim=True))
        along = (means - vector.gather(-1, self.classes)).mul_(self.scale)
        return along.movedim(-1, 0).flatten(2).sum(2) if along.dim() > 2 else along.T

    def combined(self, factors: Tensor) -> Tensor:
        product, dtype = torch.empty_like(self.logits), product_dtype(self.logits)
        each = factors.to(dtype).T.mul(self.scale)
        each = each.view(len(each), *(1,) * (self.logits.dim() - 2), -1).expand(self.classes.shape)
        for logits, part, into in row_pieces(-1, self.logits, each.sum(-1, keepdim=True), product):
            into.copy_(logits.softmax(-1, dtype=dtype).mul_(part))
        product.scatter_add_(-1, self.classes, -each.to(product.dtype))
        return product.movedim(-1, self.dim)


Columns: TypeAlias = DenseColumns | ClassColumns
"""The rows of the root ``S`` that belong to one leaf of the outputs."""

ColumnsAt: TypeAlias = Callable[[Tensor], Columns]
"""The gradients at targets that are drawn already, for a leaf of the outputs."""


def _in_rows(tensor: Tensor) -> Tensor:
    """``[R, B, *out]`` as ``[R, B, M]``."""
    return tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)
