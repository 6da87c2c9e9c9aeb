"""Products of Jacobians of two batches, block by block, from the factors of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import empty
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._kernels.gram import Axes, Gram
from jacfunc._kernels.sampled_function import KernelSamples
from jacfunc._types import Leaves, Tree

Progress: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps a sequence, to watch it being worked off."""


@dataclass(frozen=True)
class KeptAxes:
    """Which axes of a sample's output are not kept twice.

    Args:
        traced: summed over.
        diagonal: kept once.
    """

    traced: tuple[int, ...]
    diagonal: tuple[int, ...]

    @classmethod
    def of(cls, traced: int | Sequence[int], diagonal: int | Sequence[int]) -> KeptAxes:
        return cls(
            (traced,) if isinstance(traced, int) else tuple(traced),
            (diagonal,) if isinstance(diagonal, int) else tuple(diagonal),
        )

    def ordered(self, dim: int) -> tuple[list[int], list[int], list[int]]:
        """The axes of an output of so many: diagonal, kept, traced."""
        for axis in (*self.diagonal, *self.traced):
            if not -dim <= axis < dim:
                raise ValueError(
                    f"ntk: trace_axes and diagonal_axes must be axes of one sample's output, got "
                    f"{axis} for one of {dim}. Count without the batch."
                )
        diagonal, traced = ([a % dim for a in axes] for axes in (self.diagonal, self.traced))
        if len({*diagonal, *traced}) < len(diagonal) + len(traced):
            raise ValueError(
                f"ntk: trace_axes and diagonal_axes must not share an axis, got {self.traced} and "
                f"{self.diagonal}. Name each once."
            )
        return diagonal, [a for a in range(dim) if a not in diagonal + traced], traced


@dataclass(frozen=True)
class SampleRange:
    """Some samples of a batch."""

    samples: KernelSamples
    start: int
    stop: int

    def pulled(self, wanted: KeptAxes) -> list[LeafRows]:
        """All rows of each output leaf."""
        factors = self.samples.between(self.start, self.stop)
        with self.samples.undisturbed(), self.samples.factored():
            return [_pulled(factors, number, wanted) for number in range(len(factors.outputs))]


@dataclass(frozen=True)
class LeafRows:
    """The rows of one output leaf, as factors: in the order diagonal, kept, traced."""

    parts: list[list[Part]]
    params: Leaves
    size: int
    shapes: list[tuple[int, ...]]
    """Of the axes that are diagonal, kept, traced."""
    like: Tensor

    @property
    def axes(self) -> Axes:
        return Axes(*(prod(shape) for shape in self.shapes))

    def times(self, other: LeafRows) -> Tensor:
        """``[B1, B2, *diagonal, *kept, *kept]``."""
        gram = Gram(self.like, (self.size, other.size), self.axes, other is self)
        for mine, theirs, param in zip(self.parts, other.parts, self.params, strict=True):
            gram.add(mine, theirs, param)
        diagonal, kept, _ = self.shapes
        total = gram.whole().permute(1, 3, 0, 2, 4)
        return total.reshape(self.size, other.size, *diagonal, *kept, *kept)

    def mirrored(self, block: Tensor) -> Tensor:
        """The block on the other side of the diagonal."""
        lead, kept = 2 + len(self.shapes[0]), len(self.shapes[1])
        mine, theirs = range(lead, lead + kept), range(lead + kept, lead + 2 * kept)
        return block.permute(1, 0, *range(2, lead), *theirs, *mine)


@torch.no_grad()
def product_of(
    first: Sequence[SampleRange],
    second: Sequence[SampleRange],
    wanted: KeptAxes,
    progress: Progress | None,
) -> Tree:
    """``J₁ J₂ᵀ`` of all chunks, a kernel for each output leaf; half of it, where both are one."""
    is_symmetric = second is first
    rows, columns = _ranges(first), _ranges(second)
    pairs = [
        (i, j) for i in range(len(rows)) for j in range(i + 1 if is_symmetric else len(columns))
    ]
    results: list[Tensor] = []
    row, mine = -1, list[LeafRows]()
    for i, j in progress(pairs) if progress else pairs:
        if row != i:
            row, mine = i, first[i].pulled(wanted)
        theirs = mine if is_symmetric and i == j else second[j].pulled(wanted)
        blocks = [left.times(right) for left, right in zip(mine, theirs, strict=True)]
        if len(pairs) == 1:
            return first[0].samples.last_call.output_tree(blocks)
        if not results:
            sizes = rows[-1].stop, columns[-1].stop
            results = [empty(block, (*sizes, *block.shape[2:])) for block in blocks]
        for left, block, result in zip(mine, blocks, results, strict=True):
            result[rows[i], columns[j]] = block
            if is_symmetric and i != j:
                result[columns[j], rows[i]] = left.mirrored(block)
    return first[0].samples.last_call.output_tree(results)


def _ranges(side: Sequence[SampleRange]) -> list[slice]:
    """Where the samples of each chunk are, among all."""
    stops = list(accumulate(chunk.stop - chunk.start for chunk in side))
    return [slice(start, stop) for start, stop in pairwise([0, *stops])]


def _pulled(factors: FactoredJacobian, number: int, wanted: KeptAxes) -> LeafRows:
    out, size = factors.of_one[number], factors.samples.size
    orders = wanted.ordered(out.dim())
    order = torch.arange(out.numel(), device=out.device).view(out.shape)
    order = order.permute([axis for axes in orders for axis in axes]).flatten()
    seeds = torch.eye(out.numel(), dtype=out.dtype, device=out.device)[order]
    cotangents = seeds.view(-1, 1, *out.shape).expand(-1, size, *out.shape)
    parts = factors.of_cotangents((cotangents,), slice(number, number + 1))
    shapes = [tuple(out.shape[axis] for axis in axes) for axes in orders]
    return LeafRows(parts, factors.params, size, shapes, out)
