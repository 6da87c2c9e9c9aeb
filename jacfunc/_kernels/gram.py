"""Products of Jacobians with each other, ``J₁ J₂ᵀ``, from their factors: J itself is never whole.

A layer's part takes the cheaper of two routes, by counted operations. Through its positions:
``Σₜₛ (a₁ₜ·a₂ₛ)(g₁ₜ·g₂ₛ)``, never longer than its inputs and outputs; with one position that is
``(A₁A₂ᵀ)∘(G₁G₂ᵀ)``. Or through its rows, written out for a few outputs at a time.

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
"""A symmetric product is made of so many blocks of rows, each up to the diagonal."""

MOVED = 16
"""Multiplications that take as long as writing one number, and reading it again."""


Positional: TypeAlias = Outer | Gather


@dataclass(frozen=True)
class Axes:
    """What becomes of the K cotangents: K = diagonal · kept · traced, in this order."""

    diagonal: int
    kept: int
    traced: int

    def of(self, seeds: Tensor) -> Tensor:
        """``[K, B, …]`` as ``[D, B, F, S, …]``."""
        apart: Tensor = seeds.unflatten(0, (self.diagonal, self.kept, self.traced)).movedim(3, 1)
        return apart


class Gram:
    """The sum ``[D, B₁, F, B₂, F]``, to which one parameter after the other is added.

    Args:
        is_symmetric: both sides are the same; what is above the diagonal is left out, until
            :meth:`whole` mirrors it.
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

    def add(self, mine: Sequence[Part], theirs: Sequence[Part], param: Tensor) -> None:
        """One parameter's part."""
        if not mine or not theirs:
            return
        pair = _positional(mine, theirs)
        if pair is not None and not self._is_cheaper_by_rows(*pair):
            self._add_by_positions(*pair)
            return
        step = None if pair is None else self._few_outputs(pair[0])
        left = self._pieces(mine, param, step, self.total.shape[1])
        right = self._pieces(theirs, param, step, self.total.shape[3])
        for some in left:
            self._add_by_rows(some, some if self.is_symmetric else next(right))

    def whole(self) -> Tensor:
        """The sum, all of it."""
        if not self.is_symmetric:
            return self.total
        order = torch.arange(self.total.shape[1], device=self.total.device)
        is_made = (order.unsqueeze(1) >= order)[:, None, :, None]
        return torch.where(is_made, self.total, self.total.movedim((1, 2), (3, 4)))

    def _add_by_rows(self, left: Tensor, right: Tensor) -> None:
        """Of rows ``[B, K, P]``."""
        mine = self._as_matrices(left)
        theirs = mine if self.is_symmetric else self._as_matrices(right)
        kept = self.axes.kept
        for start, stop in self._ranges(self.at_once):
            end = stop if self.is_symmetric else theirs.shape[1] // kept
            products = mine[:, start * kept : stop * kept] @ theirs[:, : end * kept].mT
            self._part(start, stop, end).add_(products.view_as(self._part(start, stop, end)))

    def _pieces(
        self, parts: Sequence[Part], param: Tensor, step: int | None, size: int
    ) -> Iterator[Tensor]:
        """Rows ``[B, K, P]`` of some outputs at a time; of all, where there are no positions."""
        form, num_seeds = parts[0].form, self.axes.diagonal * self.axes.kept * self.axes.traced
        if step is None or not isinstance(form, Outer):
            zeros = partial(param.new_zeros, (size, num_seeds, *param.shape))
            yield rows(parts, zeros).reshape(size, num_seeds, -1)
            return
        for g in range(form.groups):
            inputs = form.inputs[:, g].to(form.cotangents.dtype)
            for some in form.cotangents[:, :, g].split(step, -1):  # [K, B, T, o]
                left = some.permute(1, 0, 3, 2).flatten(1, 2)
                yield torch.bmm(left, inputs).view(size, num_seeds, -1)

    def _few_outputs(self, form: Positional) -> int:
        """Outputs of a layer of which the rows are one piece."""
        seeds = _seeds(form)
        return max(
            1, self.at_once // (seeds.shape[:2].numel() * _width(form) * seeds.element_size())
        )

    def _as_matrices(self, rows: Tensor) -> Tensor:
        """``[B, K, P]`` as ``[D, B·F, S·P]``."""
        seeds = self.axes.of(rows.transpose(0, 1))
        return seeds.flatten(3).flatten(1, 2)

    def _add_by_positions(self, left: Positional, right: Positional) -> None:
        mine, theirs = _vectors(left, self.axes), _vectors(right, self.axes)
        alike = _similarity(left, right)  # [g, B₁, T₁, B₂, T₂]
        (_, groups, _, kept, places, _), others = mine.shape, theirs.shape[4]
        one = self.axes.diagonal * groups * kept * places * theirs[0, 0, ..., 0].numel()
        for start, stop in self._ranges(self.at_once // (one * mine.element_size())):
            end = stop if self.is_symmetric else theirs.shape[2]
            some = mine[:, :, start:stop].flatten(2, 4)
            products = some @ theirs[:, :, :end].flatten(2, 4).mT
            apart = products.view(-1, groups, stop - start, kept, places, end, kept, others)
            weights = alike[:, start:stop, :, :end].unsqueeze(2).unsqueeze(5)
            part = self._part(start, stop, end)
            if groups * places * others == 1:
                part.addcmul_(apart.view_as(part), weights[0].view(stop - start, 1, end, 1))
            else:
                part.add_(apart.mul_(weights).sum((1, 4, 7)))

    def _part(self, start: int, stop: int, end: int) -> Tensor:
        return self.total[:, start:stop, :, :end]

    def _ranges(self, most: int) -> Iterator[tuple[int, int]]:
        """Samples of the first side, some at a time."""
        size = self.total.shape[1]
        step = max(1, min(most, -(-size // self.blocks) if self.is_symmetric else size))
        for start in range(0, size, step):
            yield start, min(start + step, size)

    def _is_cheaper_by_rows(self, left: Positional, right: Positional) -> bool:
        """By counted multiplications, and numbers that are written."""
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
    mine: Sequence[Part], theirs: Sequence[Part]
) -> tuple[Positional, Positional] | None:
    """The only form on both sides, if it has positions."""
    if len(mine) != 1 or len(theirs) != 1 or mine[0].path != theirs[0].path:
        return None
    left, right = mine[0].form, theirs[0].form
    if isinstance(left, Outer) and isinstance(right, Outer) and left.is_turned == right.is_turned:
        return left, right
    return (left, right) if isinstance(left, Gather) and isinstance(right, Gather) else None


def _vectors(form: Positional, axes: Axes) -> Tensor:
    """Cotangents as ``[D, g, B, F, T, S·O]``."""
    seeds = axes.of(_seeds(form))  # [D, B, F, S, g, T, O]
    return seeds.permute(0, 4, 1, 2, 5, 3, 6).flatten(5)


def _seeds(form: Positional) -> Tensor:
    """``[K, B, g, T, O]``."""
    return form.cotangents if isinstance(form, Outer) else form.cotangents.unsqueeze(2)


def _width(form: Positional) -> int:
    """Inputs at a position; a table has one for each of its rows."""
    return form.inputs.shape[-1] if isinstance(form, Outer) else form.shape[0]


def _similarity(left: Positional, right: Positional) -> Tensor:
    """Products of the inputs at all positions, ``[g, B₁, T₁, B₂, T₂]``."""
    if isinstance(left, Outer) and isinstance(right, Outer):
        mine, theirs = (form.inputs.transpose(0, 1) for form in (left, right))
        products = mine.flatten(1, 2) @ theirs.flatten(1, 2).mT
        return products.view(*mine.shape[:3], *theirs.shape[1:3]).to(left.cotangents.dtype)
    assert isinstance(left, Gather)
    assert isinstance(right, Gather)
    same = left.index[:, :, None, None] == right.index
    return same.unsqueeze(0).to(left.cotangents.dtype)
