"""What tells layouts apart: the numbers of samples in another batch, and zero cotangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
        seen: the tensors, with the layouts that nothing has contradicted yet.
        size: samples of this batch.
    """

    seen: Mapping[Key, Seen]
    size: int

    def by_numbers(self, samples: list[int]) -> Evidence:
        """What is left without layouts that contradict the other batch, which has these samples."""

        def may_be(_: Key, seen: Seen, layout: Layout | None) -> bool:
            return has_numbers(seen.every, self.size, seen.other, samples, layout)

        return self._narrowed(may_be)

    def by_cotangents(self, inside: Tensor, pulled: Mapping[Key, Tensor]) -> Evidence:
        """What is left without layouts that give a sample a cotangent which must be zero.

        Args:
            inside: groups of samples ``[K, B]``: which samples are in each.
            pulled: for results of operations cotangents ``[K, *z]``, pulled back from outputs with
                a cotangent for each group that is zero for all other samples.
        """

        def may_be(key: Key, _: Seen, layout: Layout | None) -> bool:
            if layout is None or key not in pulled:
                return True
            rest = layout.of_all(pulled[key], self.size, 1)[~inside.to(pulled[key].device)]
            return not bool(((rest != 0) & ~rest.isnan()).any())

        return self._narrowed(may_be)

    def sites(self) -> tuple[Sites, set[int]]:
        """The layouts; and the numbers of operations that have a tensor with none, or several."""
        known: dict[int, list[tuple[Layout | None, Size]]] = {}
        for key, seen in self.seen.items():
            if len(seen.layouts) == 1:
                known.setdefault(key[0], []).append((seen.layouts[0], seen.every.shape))
        sites, unknown = Sites(), set[int]()
        for key, seen in self.seen.items():
            layouts = seen.layouts
            if len(layouts) > 1:
                shape = seen.every.shape
                beside = [x for x, other in known.get(key[0], ()) if x and _share(x, shape, other)]
                layouts = [layout for layout in layouts if layout in beside]
            if len(layouts) == 1:
                sites[key] = Site(seen.func, self._one(seen, layouts[0]), layouts[0])
            else:
                sites[key] = None
                unknown.add(key[0])
        return sites, unknown

    def _narrowed(self, may_be: Callable[[Key, Seen, Layout | None], bool]) -> Evidence:
        narrowed = {
            key: replace(seen, layouts=[x for x in seen.layouts if may_be(key, seen, x)])
            for key, seen in self.seen.items()
        }
        return replace(self, seen=narrowed)

    def _one(self, seen: Seen, layout: Layout | None) -> Size:
        """The shape of a tensor for one sample alone."""
        shape = list(seen.every.shape)
        if layout is not None:
            shape[layout.dim] //= self.size
        return Size(shape)


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
