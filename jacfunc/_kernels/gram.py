"""Adds up the product ``J₁ J₂ᵀ`` over all parameters, from factored Jacobians.

Each parameter takes the cheaper of two routes. At one position the route through positions is
``(A₁A₂ᵀ)∘(G₁G₂ᵀ)``, and parameters with the same cotangents, as weight and bias have, share
``G₁G₂ᵀ``. Rows are written out for a few outputs at a time, and small ones lie beside each other
in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from math import prod
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from jacfunc._factored import Part, rows
from jacfunc._kernels.routes import Axes, BothParts, Pair, Positional, Routes, Weighted
from jacfunc._memory import MULTIPLIED_BYTES
from jacfunc._types import Leaves
from jacfunc.layers import Outer

BLOCKS, BLOCKED = 4, 2**21
"""A symmetric product is computed in at most so many blocks of rows, each up to the diagonal. A
block is worth its overhead if it has so many of the product's multiplications."""

LONG = 128
"""Products of shorter rows take no longer than to put blocks together."""

SMALL = 64
"""Rows of this part of what is made at once, or less, are copied beside others."""

BothRows: TypeAlias = tuple[Tensor, Tensor]
"""Rows ``[B, K, p]`` of the same entries on both sides."""

Side = TypeVar("Side")


class Gram:
    """The sum ``[D, B₁, F, B₂, F]`` over parameters.

    Args:
        like: a tensor of the sum's device.
        sizes: the number of samples of both sides.
        axes: how many cotangents are diagonal, kept and traced.
        is_symmetric: are both sides the same? Then entries above the diagonal may be left out until
            :meth:`whole` mirrors them.
        at_once: bytes of rows, or of products of positions, that are made at once.
        blocked: multiplications for which a block of a symmetric product is worth its overhead.
        dtype: in which products are computed; by default that of ``like``.
    """

    def __init__(
        self,
        like: Tensor,
        sizes: tuple[int, int],
        axes: Axes,
        is_symmetric: bool,
        at_once: int = MULTIPLIED_BYTES,
        blocked: int = BLOCKED,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sizes, self.axes, self.is_symmetric = sizes, axes, is_symmetric
        self.at_once, self.blocked, self._is_half = at_once, blocked, False
        self.dtype, self._like = dtype or like.dtype, like
        self._by_output: Tensor | None = None
        """The sum of what is added in the order of cotangents, ``[D, F, B₁, F, B₂]``."""

    @cached_property
    def _by_sample(self) -> Tensor:
        """The sum of what is added in the order ``[D, B₁, F, B₂, F]``."""
        (first, second), kept = self.sizes, self.axes.kept
        shape = (self.axes.diagonal, first, kept, second, kept)
        return self._like.new_zeros(shape, dtype=self.dtype)

    def add(
        self, lefts: Sequence[list[Part]], rights: Sequence[list[Part]], params: Leaves
    ) -> None:
        """Add what parameters contribute, from the parts of each on both sides."""
        routes = Routes.of(lefts, rights, params, self.axes, self.is_symmetric)
        for pair in routes.by_positions:
            self._add_by_positions(pair)
        self._add_by_rows(chain.from_iterable(map(self._chunks, routes.by_rows)))
        for weighted in routes.weighted.values():
            self._add_weighted(weighted)

    def whole(self) -> Tensor:
        """The sum, with the entries above the diagonal."""
        sums = []
        if self._by_output is not None:
            axis = 1 if self.axes.kept > 1 else 2
            sums.append(self._mirrored(self._by_output, axis).permute(0, 2, 1, 4, 3))
        if "_by_sample" in vars(self) or not sums:
            sums.append(self._mirrored(self._by_sample, 1))
        return sums[0] if len(sums) == 1 else sums[1] + sums[0]

    def _mirrored(self, total: Tensor, axis: int) -> Tensor:
        """A sum with the entries whose index on this axis is less than that two axes on."""
        if not self._is_half:
            return total
        index = torch.arange(total.shape[axis], device=total.device)
        behind = index[(..., *(None,) * (4 - axis))]
        is_computed = behind >= index[(..., *(None,) * (2 - axis))]
        return torch.where(is_computed, total, total.movedim((1, 2), (3, 4)))

    def _add_weighted(self, weighted: Weighted) -> None:
        """Add products of cotangents at one position, times products of inputs ``[B₁, B₂]``.

        Blocks are of outputs, which come first among cotangents, or of samples if one is kept.
        """
        pair = weighted.pairs[0]
        lefts, rights = self._both(self._by_outputs, pair.lefts, pair.rights)
        (first, second), kept = self.sizes, self.axes.kept
        shape = (self.axes.diagonal, kept, first, kept, second)
        axis = 1 if kept > 1 else 2
        weights = weighted.weights(self.dtype)
        every = weights() if axis == 1 else None
        beside = 0 if axis == 1 else weighted.width
        nbytes = prod(shape) * lefts.itemsize
        for start, stop, end in self._blocks(lefts, rights, axis, nbytes, beside):
            some, others = cut(lefts, axis, start, stop), cut(rights, axis, 0, end)
            left = some.flatten(1, 2).squeeze(0)  # for one product there are faster kernels
            products = left @ (left if others is some else others.flatten(1, 2).squeeze(0)).mT
            some_of = weights(slice(start, stop), slice(end)) if every is None else every
            factors = some_of.unsqueeze(1)
            if self._by_output is None:
                if products.numel() == prod(shape):
                    self._by_output = products.view(shape).mul_(factors)
                    continue
                self._by_output = products.new_zeros(shape)
            part = cut(cut(self._by_output, axis, start, stop), axis + 2, 0, end)
            part.addcmul_(products.view(part.shape), factors)

    def _add_by_positions(self, pair: Pair) -> None:
        """Add the products of cotangents at all pairs of positions, weighted by those of inputs."""
        lefts, rights = self._both(self._by_positions, pair.lefts, pair.rights)
        similarity = pair.similarity(self.dtype)[:, :, None, :, :, None]
        nbytes = similarity.nbytes * self.axes.diagonal * self.axes.kept**2
        for start, stop, end in self._blocks(lefts, rights, 2, nbytes):
            some, others = lefts[:, :, start:stop], rights[:, :, :end]
            products = some.flatten(2, 4) @ others.flatten(2, 4).mT
            products = products.view(*some.shape[:5], *others.shape[2:5])
            products.mul_(similarity[:, start:stop, :, :, :end])
            self._by_sample[:, start:stop, :, :end].add_(products.sum((1, 4, 7)))

    def _add_by_rows(self, chunks: Iterable[BothRows]) -> None:
        """Add the products of rows, those of small chunks beside each other."""
        waiting: list[BothRows] = []
        nbytes = 0
        for chunk in chunks:
            if chunk[0].nbytes > self.at_once // SMALL:
                self._add_beside([chunk])
                continue
            waiting.append(chunk)
            nbytes += chunk[0].nbytes
            if nbytes > self.at_once // 4:
                self._add_beside(waiting)
                waiting, nbytes = [], 0
        if waiting:
            self._add_beside(waiting)

    def _add_beside(self, chunks: Sequence[BothRows]) -> None:
        """Add the products of rows that lie beside each other."""
        lefts, rights = self._both(self._by_rows, *zip(*chunks, strict=True))
        for start, stop, end in self._blocks(lefts, rights, 1, 0):
            some, others = cut(lefts, 1, start, stop), cut(rights, 1, 0, end)
            products = torch.bmm(some.flatten(1, 2), others.flatten(1, 2).mT)
            part = self._by_sample[:, start:stop, :, :end]
            part.add_(products.view(part.shape))

    def _blocks(
        self, lefts: Tensor, rights: Tensor, axis: int, nbytes: int, beside: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """Ranges of the first side's axis, each with the end of those on the other side.

        Args:
            nbytes: of the products of all ranges.
            beside: multiplications for each number of these, by which they are weighted.
        """
        size, count, length = lefts.shape[axis], 1, lefts.shape[-1] + beside
        if self.is_symmetric and length >= min(LONG, self.blocked):
            multiplications = prod(lefts.shape[:-1]) * prod(rights.shape[1:-1]) * length
            count = min(BLOCKS, multiplications // self.blocked)
        count = max(1, count, -(-nbytes // self.at_once))
        step = -(-size // count)
        self._is_half |= self.is_symmetric and step < size
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield start, stop, stop if self.is_symmetric else rights.shape[axis]

    def _chunks(self, both: BothParts) -> Iterator[BothRows]:
        """Rows of one parameter: for a few outputs at a time, or all if there are no positions."""
        left, right, param, pair = both
        lefts = self._written(left, param, pair.left if pair else None, self.sizes[0])
        if self.is_symmetric:
            yield from ((chunk, chunk) for chunk in lefts)
            return
        rights = self._written(right, param, pair.right if pair else None, self.sizes[1])
        yield from zip(lefts, rights, strict=True)

    def _written(
        self, parts: Sequence[Part], param: Tensor, form: Positional | None, size: int
    ) -> Iterator[Tensor]:
        """Rows ``[B, K, p]`` of one side, for as many outputs at a time as both sides have room."""
        num_seeds, dtype = self.axes.count, self.dtype
        if not isinstance(form, Outer):
            zeros = partial(param.new_zeros, (size, num_seeds, *param.shape))
            yield rows(parts, zeros).reshape(size, num_seeds, -1).to(dtype)
            return
        bytes_of_one = num_seeds * max(self.sizes) * form.width * self.dtype.itemsize
        step = max(1, self.at_once // max(1, bytes_of_one))
        for group in range(form.groups):
            inputs = form.inputs[:, group].to(dtype)
            for seeds in form.cotangents[:, :, group].split(step, -1):  # [K, B, T, o]
                outputs = seeds.to(dtype).permute(1, 0, 3, 2).flatten(1, 2)
                yield torch.bmm(outputs, inputs).view(size, num_seeds, -1)

    def _both(
        self, matrices: Callable[[Side], Tensor], left: Side, right: Side
    ) -> tuple[Tensor, Tensor]:
        """What is made of both sides, once if they are the same."""
        lefts = matrices(left)
        return lefts, lefts if self.is_symmetric else matrices(right)

    def _by_outputs(self, cotangents: Tensor) -> Tensor:
        """Cotangents at one position, ``[D, F, B, S·O]``."""
        seeds, axes = cotangents.to(self.dtype), self.axes
        size, width = seeds.shape[1], axes.traced * seeds.shape[-1]
        if axes.traced > 1:
            seeds = axes.split(seeds).transpose(2, 3)  # [D, F, B, S, …, O]
        return seeds.reshape(axes.diagonal, axes.kept, size, width)

    def _by_positions(self, cotangents: Tensor) -> Tensor:
        """Cotangents at all positions, ``[D, g, B, F, T, S·O]``."""
        seeds = self.axes.split(cotangents.to(self.dtype))
        return seeds.permute(0, 4, 3, 1, 5, 2, 6).flatten(5)

    def _by_rows(self, chunks: Sequence[Tensor]) -> Tensor:
        """Rows that lie beside each other, ``[D, B, F, S·P]``."""
        beside = chunks[0] if len(chunks) == 1 else torch.cat(tuple(chunks), -1)
        return self.axes.split(beside.transpose(0, 1)).permute(0, 3, 1, 2, 4).flatten(3)


def cut(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """A range of an axis; the tensor itself if that is all of it."""
    size = stop - start
    return tensor if size == tensor.shape[axis] else tensor.narrow(axis, start, size)
