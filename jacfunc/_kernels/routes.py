"""The two routes by which one parameter adds to ``J₁ J₂ᵀ``, and which of them is cheaper.

Through positions: ``Σₜₛ (a₁ₜ·a₂ₛ)(g₁ₜ·g₂ₛ)``, never longer than its inputs and outputs. Or through
rows, which are written out.

Source: Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural tangent kernel" (ICML 2022),
section 3.3 on structured derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from jacfunc._factored import Part, place_of
from jacfunc._types import Leaves
from jacfunc.layers import Gather, Outer, Rows

EVERY = slice(None)

MOVED = 16
"""How many multiplications take as long as writing one number and reading it again."""

Weights: TypeAlias = Callable[..., Tensor]
"""Makes products ``[B₁, B₂]`` of all samples, or of a slice of those on both sides."""

Positional: TypeAlias = Outer | Gather
"""Forms with positions, which the first route takes."""


@dataclass(eq=False, slots=True)
class Axes:
    """How many of the K cotangents are diagonal, kept and traced: K is their product."""

    diagonal: int
    kept: int
    traced: int

    @property
    def count(self) -> int:
        """The number K of cotangents."""
        return self.diagonal * self.kept * self.traced

    def split(self, seeds: Tensor) -> Tensor:
        """Cotangents ``[K, …]`` as ``[D, F, S, …]``: diagonal, kept, traced."""
        return seeds.reshape(self.diagonal, self.kept, self.traced, *seeds.shape[1:])


@dataclass(eq=False, slots=True)
class Pair:
    """The forms of one parameter on both sides, which have positions.

    Args:
        lefts: the cotangents of the left form, ``[K, B, g, T, O]``.
        rights: those of the right one.
    """

    left: Positional
    right: Positional
    lefts: Tensor
    rights: Tensor

    @classmethod
    def of(cls, lefts: Sequence[Part], rights: Sequence[Part]) -> Pair | None:
        """The pair of one form on each side; None for several, and forms of other kinds."""
        if len(lefts) != 1 or len(rights) != 1 or lefts[0].path != rights[0].path:
            return None
        left, right = lefts[0].form, rights[0].form
        if isinstance(left, Outer) and isinstance(right, Outer):
            is_alike = left.is_transposed == right.is_transposed
            return cls(left, right, left.cotangents, right.cotangents) if is_alike else None
        if not (isinstance(left, Gather) and isinstance(right, Gather)):
            return None
        return cls(left, right, left.cotangents.unsqueeze(2), right.cotangents.unsqueeze(2))

    @property
    def is_at_one_position(self) -> bool:
        """Have both sides one position, in one group?"""
        return self.lefts.shape[2:4] == (1, 1) == self.rights.shape[2:4]

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Inputs of both sides at one position as matrices; None of tables, which have indices."""
        left, right = self.left, self.right
        if isinstance(left, Gather) or isinstance(right, Gather):
            return None
        first = left.inputs.to(dtype).flatten(1)
        return first, first if right is left else right.inputs.to(dtype).flatten(1)

    def similarity(self, dtype: torch.dtype) -> Tensor:
        """The products of inputs at all pairs of positions, ``[g, B₁, T₁, B₂, T₂]``."""
        left, right = self.left, self.right
        if isinstance(left, Outer) and isinstance(right, Outer):
            lefts, rights = (x.inputs.to(dtype).transpose(0, 1) for x in (left, right))
            products = torch.bmm(lefts.flatten(1, 2), rights.flatten(1, 2).mT)
            return products.view(*lefts.shape[:3], *rights.shape[1:3])
        assert isinstance(left, Gather)
        assert isinstance(right, Gather)
        is_same = left.index[:, :, None, None] == right.index
        return is_same.unsqueeze(0).to(dtype)

    def is_cheaper_by_rows(self, axes: Axes, is_symmetric: bool) -> bool:
        """Is the route through rows cheaper, by multiplications and numbers written?"""
        _, first, groups, places, outs = self.lefts.shape
        _, second, _, others, _ = self.rights.shape
        ins = self.left.width if isinstance(self.left, Outer) else self.left.shape[0]
        pairs, seeds = first * second, axes.diagonal * axes.kept**2
        length = axes.traced * outs
        positions = groups * pairs * places * others * (ins + seeds * (length + MOVED))
        sides = first * places + (0 if is_symmetric else second * others)
        numbers = axes.diagonal * axes.kept * length * ins * groups
        rows = numbers * (sides + MOVED * (first + second)) + pairs * seeds * length * ins * groups
        return rows < positions


def places_of(left: Tensor, right: Tensor) -> Hashable:
    """The places of both sides' cotangents in memory."""
    place = place_of(left)
    return place, place if right is left else place_of(right)


def places_of_rows(lefts: Sequence[Part], rights: Sequence[Part]) -> Hashable:
    """The places of both sides' rows in memory; None if these are not rows of a whole parameter."""
    if len(lefts) != 1 or len(rights) != 1 or lefts[0].path or rights[0].path:
        return None
    left, right = lefts[0].form, rights[0].form
    if isinstance(left, Rows) and isinstance(right, Rows):
        return places_of(left.products, right.products)
    return None


class BothParts(NamedTuple):
    """The parts of one parameter on both sides, and their pair if they have one."""

    left: list[Part]
    right: list[Part]
    param: Tensor
    pair: Pair | None


@dataclass(eq=False, slots=True)
class Weighted:
    """Pairs at one position that have the same cotangents.

    Args:
        ones: how many parameters have no inputs beside these cotangents, as a bias has none.
    """

    pairs: list[Pair]
    ones: int = 0

    @property
    def width(self) -> int:
        """How many numbers the inputs have of a sample."""
        return sum(pair.left.width for pair in self.pairs if isinstance(pair.left, Outer))

    def weights(self, dtype: torch.dtype) -> Weights:
        """Makes the products of inputs, added up; those of a bias are 1."""
        every = [(pair, pair.inputs(dtype)) for pair in self.pairs]
        # made of no tensor, so that a written sweep computes it once for all calls
        device = self.pairs[0].lefts.device
        ones = torch.full((), self.ones, dtype=dtype, device=device) if self.ones else None

        def some(rows: slice | None = None, columns: slice | None = None) -> Tensor:
            total = ones
            for pair, inputs in every:
                if inputs is None:
                    products = pair.similarity(dtype)[0, rows or EVERY, 0, columns or EVERY, 0]
                    total = products if total is None else products.add_(total)
                    continue
                first = inputs[0] if rows is None else inputs[0][rows]
                second = inputs[1] if columns is None else inputs[1][columns]
                total = first @ second.mT if total is None else total.addmm(first, second.mT)
            assert total is not None
            return total

        return some


class Routes(NamedTuple):
    """The route of each parameter.

    Args:
        weighted: pairs at one position, by the places of their cotangents.
        by_positions: pairs at several positions.
        by_rows: what is to be written out.
    """

    weighted: dict[Hashable, Weighted]
    by_positions: list[Pair]
    by_rows: list[BothParts]

    @classmethod
    def of(
        cls,
        lefts: Sequence[list[Part]],
        rights: Sequence[list[Part]],
        params: Leaves,
        axes: Axes,
        is_symmetric: bool,
    ) -> Routes:
        """The routes of parameters, from the parts of each on both sides."""
        weighted: dict[Hashable, Weighted] = {}
        by_positions, written = list[Pair](), list[BothParts]()
        for left, right, param in zip(lefts, rights, params, strict=True):
            pair = Pair.of(left, right)
            if pair is None or pair.is_cheaper_by_rows(axes, is_symmetric):
                written.append(BothParts(left, right, param, pair))
            elif pair.is_at_one_position:
                places = places_of(pair.left.cotangents, pair.right.cotangents)
                weighted.setdefault(places, Weighted([])).pairs.append(pair)
            else:
                by_positions.append(pair)
        by_rows = []
        for both in written:
            places = places_of_rows(both.left, both.right) if weighted else None
            if places in weighted:  # outer products with the number 1
                weighted[places].ones += 1
            elif both.left and both.right:
                by_rows.append(both)
        return cls(weighted, by_positions, by_rows)
