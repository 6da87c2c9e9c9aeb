"""The product ``J₁ J₂ᵀ`` of two batches, block by block, from factored Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from jacfunc._assembly import Places, shared_units
from jacfunc._calls import BARE
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._kernels.gram import Gram
from jacfunc._kernels.routes import Axes
from jacfunc._kernels.sampled_function import KernelSamples
from jacfunc._modules import BatchOptions, RowOptions, made_at_once
from jacfunc._showing import Progress
from jacfunc._trees import Arguments
from jacfunc._types import Leaves, Tree, product_dtype


class KernelOptions(RowOptions, total=False):
    """What :func:`jacfunc.ntk` takes by keyword."""

    trace_axes: int | Sequence[int]
    diagonal_axes: int | Sequence[int]
    out: Tree
    progress: Progress | None
    batched: bool


@dataclass(frozen=True)
class KeptAxes:
    """The axes of a sample's output that the kernel does not have twice.

    Args:
        traced: axes that are summed over.
        diagonal: axes that the kernel has once.
    """

    traced: tuple[int, ...]
    diagonal: tuple[int, ...]

    @classmethod
    def of(cls, traced: int | Sequence[int], diagonal: int | Sequence[int]) -> KeptAxes:
        """From arguments of :func:`jacfunc.ntk`.

        Raises:
            TypeError: if they are no numbers of axes.
        """
        every = {"trace_axes": traced, "diagonal_axes": diagonal}
        for name, axes in every.items():
            # a tuple first: to look whether something is a sequence takes long
            numbers = axes if isinstance(axes, (tuple, Sequence)) else (axes,)
            if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
                raise TypeError(
                    f"ntk: {name} must be the number of an axis of one sample's output, or several "
                    f"of these, got {axes!r}. Count without the batch."
                )
        return cls(
            (traced,) if isinstance(traced, int) else tuple(traced),
            (diagonal,) if isinstance(diagonal, int) else tuple(diagonal),
        )

    def ordered(self, dim: int) -> tuple[list[int], list[int], list[int]]:
        """The axes of an output with ``dim`` axes, in the order diagonal, kept, traced."""
        if not (self.diagonal or self.traced):
            return [], list(range(dim)), []
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
    """The samples of a batch from start to stop."""

    samples: KernelSamples
    start: int
    stop: int

    def rows(self, axes: KeptAxes) -> list[LeafRows]:
        """All rows of the Jacobian of each output leaf."""
        with self.samples.evaluated(self.start, self.stop) as jacobian:
            return leaf_rows(jacobian, axes)


@dataclass(frozen=True)
class LeafRows:
    """All rows of the Jacobian of one output leaf, as factors.

    Args:
        parts: the parts of each parameter's Jacobian.
        params: the parameters.
        size: the number of samples.
        shapes: the sizes of the axes that are diagonal, kept and traced; rows are in this order.
        like: a tensor of the kernel's dtype and device.
    """

    parts: list[list[Part]]
    params: Leaves
    size: int
    shapes: list[tuple[int, ...]]
    like: Tensor

    @property
    def axes(self) -> Axes:
        """How many rows are diagonal, kept and traced."""
        return Axes(*map(prod, self.shapes))

    def times(self, other: LeafRows, dtype: torch.dtype | None = None) -> Tensor:
        """The kernel of this side with another, ``[B1, B2, *diagonal, *kept, *kept]``.

        Args:
            dtype: in which it is added up, and of the kernel; by default that of the outputs.
        """
        diagonal, kept, _ = self.shapes
        shape = (self.size, other.size, *diagonal, *kept, *kept)
        if 0 in shape:  # no entry to add up, and torch can't tell the sizes of what is empty
            return self.like.new_empty(shape, dtype=dtype)
        added = dtype or product_dtype(self.like, *self.params)
        sizes = self.size, other.size
        gram = Gram(self.like, sizes, self.axes, other is self, dtype=added)
        gram.add(self.parts, other.parts, self.params)
        total = gram.whole().permute(1, 3, 0, 2, 4).to(dtype or self.like.dtype)
        return total.reshape(shape)

    def mirrored(self, block: Tensor) -> Tensor:
        """The block on the other side of the kernel's diagonal."""
        lead, kept = 2 + len(self.shapes[0]), len(self.shapes[1])
        left, right = range(lead, lead + kept), range(lead + kept, lead + 2 * kept)
        return block.permute(1, 0, *range(2, lead), *right, *left)


@dataclass(frozen=True)
class KernelWithItself:
    """Makes the kernel of an evaluated batch with itself."""

    axes: KeptAxes

    @torch.no_grad()
    def __call__(self, jacobian: FactoredJacobian, seeds: Leaves) -> Leaves:
        return tuple([rows.times(rows) for rows in leaf_rows(jacobian, self.axes)])


def kernel_at_once(options: BatchOptions, arguments: Arguments, axes: KeptAxes) -> Tree | None:
    """The kernel of a batch with itself, if earlier calls have settled all but the numbers."""
    made = made_at_once(options, arguments, KernelWithItself(axes))
    if made is None:
        return None
    (kernel,), returned = made
    return kernel if returned is BARE else returned.output_tree((kernel,))


@torch.no_grad()
def product_of(
    first: Sequence[SampleRange],
    second: Sequence[SampleRange],
    axes: KeptAxes,
    progress: Progress | None,
    places: Places,
    dtype: torch.dtype | None = None,
) -> Tree:
    """A kernel ``J₁ J₂ᵀ`` for each output leaf; of one side with itself, half is computed."""
    is_symmetric = second is first
    rows, columns = _ranges(first), _ranges(second)
    pairs = [
        (i, j) for i in range(len(rows)) for j in range(i + 1 if is_symmetric else len(columns))
    ]
    results: Leaves = ()
    row, lefts = -1, list[LeafRows]()
    for i, j in progress(pairs) if progress else pairs:
        if row != i:
            row, lefts = i, first[i].rows(axes)
        rights = lefts if is_symmetric and i == j else second[j].rows(axes)
        blocks = [left.times(right, dtype) for left, right in zip(lefts, rights, strict=True)]
        tree_of = first[0].samples.last_call.output_tree
        if len(pairs) == 1 and places.out is None:
            return tree_of(blocks)
        if not results:
            sizes = rows[-1].stop, columns[-1].stop
            shapes = [(*sizes, *block.shape[2:]) for block in blocks]
            results = places.tensors(tree_of(blocks), tuple(blocks), shapes)
        for left, block, result in zip(lefts, blocks, results, strict=True):
            result[rows[i], columns[j]] = block
            if is_symmetric and i != j:
                result[columns[j], rows[i]] = left.mirrored(block)
    return places.placed(first[0].samples.last_call.output_tree(results))


def _ranges(side: Sequence[SampleRange]) -> list[slice]:
    """The place of each chunk's samples among those of all chunks."""
    stops = list(accumulate(chunk.stop - chunk.start for chunk in side))
    return [slice(start, stop) for start, stop in pairwise([0, *stops])]


def leaf_rows(jacobian: FactoredJacobian, axes: KeptAxes) -> list[LeafRows]:
    """All rows of the Jacobian of each output leaf of evaluated samples."""
    outputs = jacobian.outputs
    return [_leaf_rows(jacobian, outputs, number, axes) for number in range(len(outputs))]


def _leaf_rows(
    jacobian: FactoredJacobian, outputs: Leaves, number: int, axes: KeptAxes
) -> LeafRows:
    """All rows of output leaf ``number``, in the order diagonal, kept, traced."""
    alone, size, out = slice(number, number + 1), jacobian.size, outputs[number]
    (units,), shape = shared_units((out,)), out.shape[1:]
    orders = axes.ordered(len(shape))
    order = [axis for group in orders for axis in group]
    if order != sorted(order):
        places = torch.arange(len(units), device=units.device).view(shape).permute(order)
        units = units[:, :1][places.flatten()].expand(-1, *units.shape[1:])
    pairs = zip(jacobian.parts_of_cotangents((units,), alone), jacobian.params, strict=True)
    parts = [of_one if param.numel() else [] for of_one, param in pairs]
    shapes = [tuple(shape[axis] for axis in group) for group in orders]
    return LeafRows(parts, jacobian.params, size, shapes, out)
