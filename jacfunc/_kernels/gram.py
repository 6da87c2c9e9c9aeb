"""Adds up the product ``J₁ J₂ᵀ`` from factored Jacobians, one parameter after the other.

Each parameter takes the cheaper of two routes, by counted operations. Through positions:
``Σₜₛ (a₁ₜ·a₂ₛ)(g₁ₜ·g₂ₛ)``, never longer than its inputs and outputs; with one position that is
``(A₁A₂ᵀ)∘(G₁G₂ᵀ)``. Or through rows, which are written out for a few outputs at a time.

Source: Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural tangent kernel" (ICML 2022),
section 3.3 on structured derivatives, for the two routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._factored import Part, rows
from jacfunc._memory import MULTIPLIED_BYTES
from jacfunc.layers import Gather, Outer

BLOCKS = 4
"""A symmetric product is computed in so many blocks of rows, each up to the diagonal."""

MOVED = 16
"""How many multiplications take as long as writing one number and reading it again."""


Positional: TypeAlias = Outer | Gather
"""Forms with positions, which the first route takes."""


@dataclass(frozen=True)
class Axes:
    """How many of the K cotangents are diagonal, kept and traced: K is their product."""

    diagonal: int
    kept: int
    traced: int

    def split(self, seeds: Tensor) -> Tensor:
        """Cotangents ``[K, B, …]`` as ``[D, B, F, S, …]``: diagonal, samples, kept, traced."""
        axes: Tensor = seeds.unflatten(0, (self.diagonal, self.kept, self.traced)).movedim(3, 1)
        return axes


class Gram:
    """The sum ``[D, B₁, F, B₂, F]`` over parameters, which are added one after the other.

    Args:
        like: a tensor of the sum's dtype and device.
        sizes: the number of samples of both sides.
        axes: how many cotangents are diagonal, kept and traced.
        is_symmetric: are both sides the same? Then entries above the diagonal are left out until
            :meth:`whole` mirrors them.
        at_once: bytes of rows, or of products of positions, that are made at once.
        blocks: of rows, in which a symmetric sum is made.
    """

    def __init__(
        self,
        like: Tensor,
        sizes: tuple[int, int],
        axes: Axes,
        is_symmetric: bool,
        at_once: int = MULTIPLIED_BYTES,
        blocks: int = BLOCKS,
    ) -> None:
        self.axes, self.is_symmetric = axes, is_symmetric
        self.at_once, self.blocks = at_once, blocks
        first, second = sizes
        self.total = like.new_zeros((axes.diagonal, first, axes.kept, second, axes.kept))

    def add(self, left: Sequence[Part], right: Sequence[Part], param: Tensor) -> None:
        """Add what one parameter contributes, from its parts on both sides."""
        if not left or not right:
            return
        pair = _positional(left, right)
        if pair is not None and not self._is_cheaper_by_rows(*pair):
            self._add_by_positions(*pair)
            return
        step = None if pair is None else self._few_outputs(pair[0])
        lefts = self._chunks(left, param, step, self.total.shape[1])
        rights = self._chunks(right, param, step, self.total.shape[3])
        for chunk in lefts:
            self._add_by_rows(chunk, chunk if self.is_symmetric else next(rights))

    def whole(self) -> Tensor:
        """The sum, with the entries above the diagonal."""
        if not self.is_symmetric:
            return self.total
        order = torch.arange(self.total.shape[1], device=self.total.device)
        is_computed = (order.unsqueeze(1) >= order)[:, None, :, None]
        return torch.where(is_computed, self.total, self.total.movedim((1, 2), (3, 4)))

    def _add_by_rows(self, left: Tensor, right: Tensor) -> None:
        """Add the products of rows ``[B, K, P]`` of both sides."""
        lefts = self._as_matrices(left)
        rights = lefts if self.is_symmetric else self._as_matrices(right)
        kept = self.axes.kept
        for start, stop in self._ranges(self.at_once):
            end = stop if self.is_symmetric else rights.shape[1] // kept
            products = lefts[:, start * kept : stop * kept] @ rights[:, : end * kept].mT
            self._part(start, stop, end).add_(products.view_as(self._part(start, stop, end)))

    def _chunks(
        self, parts: Sequence[Part], param: Tensor, step: int | None, size: int
    ) -> Iterator[Tensor]:
        """Rows ``[B, K, P]`` for ``step`` outputs at a time; for all if there are no positions."""
        form, num_seeds = parts[0].form, self.axes.diagonal * self.axes.kept * self.axes.traced
        if step is None or not isinstance(form, Outer):
            zeros = partial(param.new_zeros, (size, num_seeds, *param.shape))
            yield rows(parts, zeros).reshape(size, num_seeds, -1)
            return
        for g in range(form.groups):
            inputs = form.inputs[:, g].to(form.cotangents.dtype)
            for seeds in form.cotangents[:, :, g].split(step, -1):  # [K, B, T, o]
                left = seeds.permute(1, 0, 3, 2).flatten(1, 2)
                yield torch.bmm(left, inputs).view(size, num_seeds, -1)

    def _few_outputs(self, form: Positional) -> int:
        """How many outputs to write the rows out for at once."""
        seeds = _seeds(form)
        return max(
            1, self.at_once // (seeds.shape[:2].numel() * _width(form) * seeds.element_size())
        )

    def _as_matrices(self, rows: Tensor) -> Tensor:
        """Rows ``[B, K, P]`` as matrices ``[D, B·F, S·P]``."""
        seeds = self.axes.split(rows.transpose(0, 1))
        return seeds.flatten(3).flatten(1, 2)

    def _add_by_positions(self, left: Positional, right: Positional) -> None:
        """Add the products of cotangents at all pairs of positions, weighted by those of inputs."""
        lefts, rights = _vectors(left, self.axes), _vectors(right, self.axes)
        similarity = _similarity(left, right)  # [g, B₁, T₁, B₂, T₂]
        (_, groups, _, kept, places, _), others = lefts.shape, rights.shape[4]
        numbers = self.axes.diagonal * groups * kept * places * rights[0, 0, ..., 0].numel()
        for start, stop in self._ranges(self.at_once // (numbers * lefts.element_size())):
            end = stop if self.is_symmetric else rights.shape[2]
            vectors = lefts[:, :, start:stop].flatten(2, 4)
            products = vectors @ rights[:, :, :end].flatten(2, 4).mT
            pairs = products.view(-1, groups, stop - start, kept, places, end, kept, others)
            weights = similarity[:, start:stop, :, :end].unsqueeze(2).unsqueeze(5)
            part = self._part(start, stop, end)
            if groups * places * others == 1:
                part.addcmul_(pairs.view_as(part), weights[0].view(stop - start, 1, end, 1))
            else:
                part.add_(pairs.mul_(weights).sum((1, 4, 7)))

    def _part(self, start: int, stop: int, end: int) -> Tensor:
        """The sum for samples from start to stop with those up to ``end`` of the other side."""
        return self.total[:, start:stop, :, :end]

    def _ranges(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of the first side's samples, with ``most`` samples at most."""
        size = self.total.shape[1]
        step = max(1, min(most, -(-size // self.blocks) if self.is_symmetric else size))
        for start in range(0, size, step):
            yield start, min(start + step, size)

    def _is_cheaper_by_rows(self, left: Positional, right: Positional) -> bool:
        """Is the route through rows cheaper, by multiplications and numbers written?"""
        axes = self.axes
        (groups, places, outs), ins = _seeds(left).shape[2:], _width(left)
        others = _seeds(right).shape[3]
        first, second = self.total.shape[1], self.total.shape[3]
        pairs, seeds = first * second, axes.diagonal * axes.kept**2
        length = axes.traced * outs
        positions = groups * pairs * places * others * (ins + seeds * (length + MOVED))
        sides = first * places + (0 if self.is_symmetric else second * others)
        numbers = axes.diagonal * axes.kept * length * ins * groups
        rows = numbers * (sides + MOVED * (first + second)) + pairs * seeds * length * ins * groups
        return rows < positions


def _positional(
    lefts: Sequence[Part], rights: Sequence[Part]
) -> tuple[Positional, Positional] | None:
    """The forms of both sides, if there is one on each and both have positions."""
    if len(lefts) != 1 or len(rights) != 1 or lefts[0].path != rights[0].path:
        return None
    left, right = lefts[0].form, rights[0].form
    if (
        isinstance(left, Outer)
        and isinstance(right, Outer)
        and left.is_transposed == right.is_transposed
    ):
        return left, right
    return (left, right) if isinstance(left, Gather) and isinstance(right, Gather) else None


def _vectors(form: Positional, axes: Axes) -> Tensor:
    """The cotangents of a form as vectors, ``[D, g, B, F, T, S·O]``."""
    seeds = axes.split(_seeds(form))  # [D, B, F, S, g, T, O]
    return seeds.permute(0, 4, 1, 2, 5, 3, 6).flatten(5)


def _seeds(form: Positional) -> Tensor:
    """The cotangents of a form, ``[K, B, g, T, O]``."""
    return form.cotangents if isinstance(form, Outer) else form.cotangents.unsqueeze(2)


def _width(form: Positional) -> int:
    """The number of inputs at a position; for a table, that of its rows."""
    return form.inputs.shape[-1] if isinstance(form, Outer) else form.shape[0]


def _similarity(left: Positional, right: Positional) -> Tensor:
    """The products of inputs at all pairs of positions, ``[g, B₁, T₁, B₂, T₂]``."""
    if isinstance(left, Outer) and isinstance(right, Outer):
        lefts, rights = (form.inputs.transpose(0, 1) for form in (left, right))
        products = lefts.flatten(1, 2) @ rights.flatten(1, 2).mT
        return products.view(*lefts.shape[:3], *rights.shape[1:3]).to(left.cotangents.dtype)
    assert isinstance(left, Gather)
    assert isinstance(right, Gather)
    is_same = left.index[:, :, None, None] == right.index
    return is_same.unsqueeze(0).to(left.cotangents.dtype)
