"""The parts of one parameter's Jacobian, put together: several uses, of all or some of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._factored.views import Path, shares_memory
from jacfunc.layers import Form, Outer, Rows


@dataclass(frozen=True)
class Part:
    """A form, and of which part of the parameter it is."""

    path: Path
    form: Form

    def place_in(self, block: Tensor) -> Tensor:
        """The part of ``[B, K, *param]``, to be written into; its entries lie side by side."""
        if not self.path:
            return block
        place = block.detach()[0, 0]
        for view in self.path:
            place = view(place)
        # a copy would swallow what is written
        assert shares_memory(place, block)
        # of all at once, and one view alone: autograd lets nobody write into one of several
        sizes = (*block.shape[:2], *place.shape)
        strides = (*block.stride()[:2], *place.stride())
        return block.as_strided(sizes, strides, place.storage_offset())

    def entries(self, shape: torch.Size) -> Tensor:
        """Which entries of a parameter of this shape these are."""
        mask = torch.zeros((1, 1, *shape), dtype=torch.bool)
        self.place_in(mask).fill_(True)
        return mask[0, 0]


def merged(parts: Sequence[Part]) -> list[Part]:
    """Forms that are of the same matrix as one, outer products with all their positions."""
    groups: list[list[Part]] = []
    for part in parts:
        group = next((group for group in groups if _is_alike(part, group[0])), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return [first if not others else _joined(first, others) for first, *others in groups]


def _is_alike(part: Part, other: Part) -> bool:
    mine, theirs = part.form, other.form
    if part.path != other.path:
        return False
    if isinstance(mine, Outer) and isinstance(theirs, Outer):
        alike = mine.is_turned == theirs.is_turned
        return alike and mine.inputs.shape[1::2] == theirs.inputs.shape[1::2]
    return isinstance(mine, Rows) and isinstance(theirs, Rows)


def _joined(first: Part, others: Sequence[Part]) -> Part:
    every = (first.form, *(part.form for part in others))
    outers = [form for form in every if isinstance(form, Outer)]
    if outers:
        return Part(first.path, outers[0].beside(outers[1:]))
    products = [form.products for form in every if isinstance(form, Rows)]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return Part(first.path, Rows(total))


def write(parts: Sequence[Part], block: Tensor) -> None:
    """The sum of all parts into ``[B, K, *param]``."""
    if len(parts) == 1 and not parts[0].path:
        parts[0].form.write(block)
        return
    first, others, is_whole = _apart(parts, block.shape[2:])
    if not is_whole:
        block.zero_()
    for part in first:
        part.form.write(part.place_in(block))
    for part in others:
        part.place_in(block).add_(part.form.rows())


def rows(parts: Sequence[Part], zeros: Callable[[], Tensor]) -> Tensor:
    """The same as a tensor of its own, which carries a graph where the forms do."""
    if len(parts) == 1 and not parts[0].path:
        return parts[0].form.rows()
    block = zeros()
    for part in parts:
        part.place_in(block).add_(part.form.rows())
    return block


def _apart(parts: Sequence[Part], shape: torch.Size) -> tuple[list[Part], list[Part], bool]:
    """Parts no two of which share an entry, the others, and if the former are the whole."""
    first, others = [], []
    covered = torch.zeros(shape, dtype=torch.bool)
    for part, entries in sorted(
        [(part, part.entries(shape)) for part in parts], key=lambda found: -int(found[1].sum())
    ):
        if (covered & entries).any():
            others.append(part)
        else:
            first.append(part)
            covered |= entries
    return first, others, bool(covered.all())
