"""What tells layouts apart: the numbers of samples in another batch, and zero cotangents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from jacfunc._layouts.layouts import Key, Layout, Site, Sites
from jacfunc._rounding import are_near


@dataclass(frozen=True)
class Seen:
    """A tensor of a batch beside that of another batch, and the layouts that it may have."""

    func: Any
    other: Tensor
    every: Tensor
    layouts: list[Layout | None]


ROUNDING = 0.4
"""Numbers of a sample alone differ from those in a batch by less than this power of the precision,
relative to the largest: other kernels run, and errors grow from layer to layer."""


@dataclass(frozen=True)
class Evidence:
    """What tells the layouts that were seen apart.

    Args:
        samples: of this batch, of which the other batch is made.
        is_random: does the function draw, so that its numbers can't be compared?
        inside: groups of samples ``[K, B]``: which samples are in each.
        pulled: for results of operations cotangents ``[K, *z]``, pulled back from outputs with a
            cotangent for each group that is zero for all other samples.
    """

    samples: list[int]
    size: int
    is_random: bool
    inside: Tensor
    pulled: Mapping[Key, Tensor]

    def sites(self, seen: Mapping[Key, Seen]) -> tuple[Sites, set[int]]:
        """The layouts, and numbers of operations of which some tensor has none, or several."""
        possible = {key: self._possible(key, tensor) for key, tensor in seen.items()}
        known: dict[int, list[tuple[Layout | None, Size]]] = {}
        for key, layouts in possible.items():
            if len(layouts) == 1:
                known.setdefault(key[0], []).append((layouts[0], seen[key].every.shape))
        sites, unknown = Sites(), set[int]()
        for key, layouts in possible.items():
            if len(layouts) > 1:
                shape = seen[key].every.shape
                beside = [x for x, other in known.get(key[0], ()) if x and _share(x, shape, other)]
                layouts = [layout for layout in layouts if layout in beside]
            if len(layouts) == 1:
                sites[key] = Site(seen[key].func, self._one(seen[key], layouts[0]), layouts[0])
            else:
                sites[key] = None
                unknown.add(key[0])
        return sites, unknown

    def _one(self, seen: Seen, layout: Layout | None) -> Size:
        """The shape of a tensor for one sample alone."""
        shape = list(seen.every.shape)
        if layout is not None:
            shape[layout.dim] //= self.size
        return Size(shape)

    def _possible(self, key: Key, seen: Seen) -> list[Layout | None]:
        """The layouts that neither the numbers nor the cotangents contradict."""
        layouts = seen.layouts
        if not self.is_random:
            layouts = [x for x in layouts if self._has_numbers(seen, x)]
        pulled = self.pulled.get(key)
        if pulled is not None:
            layouts = [x for x in layouts if x is None or self._is_zero_outside(pulled, x)]
        return layouts

    def _has_numbers(self, seen: Seen, layout: Layout | None) -> bool:
        """Are the numbers of samples those that they have in the other batch?"""
        return has_numbers(seen.every, self.size, seen.other, self.samples, layout)

    def _is_zero_outside(self, pulled: Tensor, layout: Layout) -> bool:
        outside = ~self.inside.to(pulled.device)
        rest = layout.of_all(pulled, self.size, 1)[outside]
        return not bool(((rest != 0) & ~rest.isnan()).any())


def _share(layout: Layout, shape: Size, other: Size) -> bool:
    """Have two tensors of one operation as many entries in the dimension of a layout?"""
    return layout.dim < min(len(shape), len(other)) and shape[layout.dim] == other[layout.dim]


def has_numbers(
    every: Tensor, size: int, other: Tensor, samples: list[int], layout: Layout | None
) -> bool:
    """Has a tensor for these samples the numbers that it has in another batch, of them alone?"""
    every, other = every.detach(), other.detach()
    if layout is None:
        return agree(other, every)
    numbers = layout.of_all(every, size)[samples]
    return agree(layout.of_all(other, len(samples)), numbers)


def agree(one: Tensor, other: Tensor) -> bool:
    """Do two tensors differ by rounding alone?"""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return are_near(one, other, ROUNDING) if one.is_floating_point() else torch.equal(one, other)
