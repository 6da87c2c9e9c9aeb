"""Puts together the parts of one parameter's Jacobian, one for each use of the parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._factored.use import Path, shares_memory
from jacfunc._torch import fixed
from jacfunc.layers import Form, Gather, Outer, Rows

KnownForm: TypeAlias = Outer | Gather | Rows


def as_known(form: Form) -> KnownForm:
    """The form as one of the three; of another one the Jacobian is written out."""
    return form if isinstance(form, KnownForm) else Rows(form.rows().transpose(0, 1))


@dataclass(eq=False)
class Part:
    """The form of one use, and the views that lead to the part of the parameter that was used."""

    path: Path
    form: Form

    def place_in(self, block: Tensor) -> Tensor:
        """The view of a contiguous block ``[B, K, *param]`` that belongs to this part."""
        if not self.path:
            return block
        place = block.detach()[0, 0]
        for view in self.path:
            place = view(place)
        # it must be no copy: what is written into one would be lost
        assert shares_memory(place, block)
        # one view, for all samples: autograd allows no write into one of several views
        sizes = (*block.shape[:2], *place.shape)
        strides = (*block.stride()[:2], *place.stride())
        return block.as_strided(sizes, strides, place.storage_offset())

    def of_samples(self, samples: slice, seeds: slice) -> Part:
        """The part of some of the samples, and of some cotangents of each."""
        return Part(self.path, as_known(self.form).of_samples(samples, seeds))

    def entries(self, shape: torch.Size) -> Tensor:
        """Which entries of a parameter of this shape belong to the part."""
        mask = torch.zeros((1, 1, *shape), dtype=torch.bool)
        self.place_in(mask).fill_(True)
        return mask[0, 0]

    def sides(self, shape: torch.Size) -> tuple[Tensor, Tensor, bool] | None:
        """What the indices of an outer product are in a parameter ``[n, *m]``, as a matrix.

        Rows of the parameter for the outputs ``[groups, O]``, columns for the inputs
        ``[groups, I]``, and True; or columns for the outputs, rows for the inputs, and False. None
        for another form, and for a parameter that has one matrix for each of several experts.
        """
        return fixed(partial(self._sides, shape))

    def _sides(self, shape: torch.Size) -> tuple[Tensor, Tensor, bool] | None:
        form, width = self.form, max(1, shape[1:].numel())
        if not isinstance(form, Outer):
            return None
        block = torch.empty((1, 1, *shape), dtype=torch.bool)  # only its strides are read
        outs, ins = form.cotangents.shape[-1], form.width
        try:
            place = self.place_in(block)[0, 0].view(form.order)
        except RuntimeError:  # no view has this order
            return None
        between, of_outs, of_ins = (place.mT if form.is_transposed else place).stride()
        first = torch.arange(form.groups).unsqueeze(1) * between + int(place.storage_offset())
        at_outs = torch.add(first, torch.arange(outs), alpha=of_outs)
        at_ins = torch.add(first, torch.arange(ins), alpha=of_ins)
        if _are_rows(at_outs, of_outs, of_ins * (ins - 1), width):
            return at_outs // width, at_ins % width, True
        if _are_rows(at_ins, of_ins, of_outs * (outs - 1), width):
            return at_outs % width, at_ins // width, False
        return None


NamedParts: TypeAlias = dict[str, list[Part]]
"""The parts of each parameter that is used, by name."""


def _are_rows(places: Tensor, stride: int, to_last: int, width: int) -> bool:
    """Do the entries of each place lie in one row, and the next place whole rows further on?"""
    if stride % width and places.shape[1] > 1:
        return False
    return bool((places // width == (places + to_last) // width).all())


def merged(parts: Sequence[Part]) -> list[Part]:
    """The parts, with those of the same entries merged: outer products, and rows."""
    groups: list[list[Part]] = []
    for part in parts:
        group = next((group for group in groups if _can_be_merged(part, group[0])), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return [first if not others else _sum(first, others) for first, *others in groups]


def _can_be_merged(part: Part, other: Part) -> bool:
    """Are the parts of the same entries, and of forms that can be added?"""
    left, right = part.form, other.form
    if part.path != other.path:
        return False
    if isinstance(left, Outer) and isinstance(right, Outer):
        is_same_order = left.is_transposed == right.is_transposed
        return is_same_order and left.inputs.shape[1::2] == right.inputs.shape[1::2]
    return isinstance(left, Rows) and isinstance(right, Rows)


def _sum(first: Part, others: Sequence[Part]) -> Part:
    """One part that is the sum of parts which can be merged."""
    forms = (first.form, *(part.form for part in others))
    outers = [form for form in forms if isinstance(form, Outer)]
    if outers:
        return Part(first.path, outers[0].beside(outers[1:]))
    products = [form.products for form in forms if isinstance(form, Rows)]
    total = products[0] + products[1]
    for product in products[2:]:
        total += product
    return Part(first.path, Rows(total))


def placed(values_of_parts: Sequence[tuple[Part, Tensor]], param: Tensor) -> Tensor:
    """A tensor like the parameter, in which the values of each part are added in its place."""
    block = values_of_parts[0][1].new_zeros((1, 1, *param.shape))
    for part, values in values_of_parts:
        part.place_in(block).add_(values)
    return block[0, 0]


def are_disjoint(parts: Sequence[Part], param: Tensor) -> bool:
    """Is no entry of the parameter in two parts? Then squares have no cross terms."""
    entries = torch.stack([part.entries(param.shape) for part in parts])
    return bool((entries.sum(0) <= 1).all())


def write(parts: Sequence[Part], block: Tensor) -> None:
    """Write the sum of all parts, merged as far as they can be, into a block ``[B, K, *param]``."""
    if len(parts) > 1:
        parts = merged(parts)
    if len(parts) == 1 and not parts[0].path:
        parts[0].form.write(block)
        return
    first, others, is_whole = _disjoint(parts, block.shape[2:])
    if not is_whole:
        block.zero_()
    for part in first:
        part.form.write(part.place_in(block))
    for part in others:
        part.place_in(block).add_(part.form.rows())


def rows(parts: Sequence[Part], zeros: Callable[[], Tensor]) -> Tensor:
    """The sum of all parts, ``[B, K, *param]``, which carries a graph if the forms do."""
    if len(parts) == 1 and not parts[0].path:
        return parts[0].form.rows()
    block = zeros()
    for part in parts:
        part.place_in(block).add_(part.form.rows())
    return block


def _disjoint(parts: Sequence[Part], shape: torch.Size) -> tuple[list[Part], list[Part], bool]:
    """Parts that share no entry, the other parts, and whether the first cover the parameter."""
    first, others = [], []
    covered = torch.zeros(shape, dtype=torch.bool)
    for part, entries in sorted(
        [(part, part.entries(shape)) for part in parts], key=lambda pair: -int(pair[1].sum())
    ):
        if (covered & entries).any():
            others.append(part)
        else:
            first.append(part)
            covered |= entries
    return first, others, bool(covered.all())
