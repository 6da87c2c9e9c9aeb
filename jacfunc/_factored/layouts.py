"""Where the tensors of a batch hold its samples, if the batch is evaluated as a whole.

The shapes in a batch of another size tell in which dimension. Where that dimension holds more than
the samples, their order is told by the numbers: those in the other batch, and cotangents that are
zero for some of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from jacfunc.layers import Rule


def begins() -> None:
    """Tell a recorder that operations are counted from here, where the user's function begins.

    What is done before, to lend a module, may change from one evaluation to the next.
    """
    if has_torch_function(()):
        handle_torch_function(begins, ())


def ends() -> None:
    """Tell a recorder that the user's function is over."""
    if has_torch_function(()):
        handle_torch_function(ends, ())


class Unlike(Exception):  # noqa: N818 (the layouts have to be learned again)
    """An evaluation has other operations, or tensors of other shapes, than what was learned."""


class NoLayout(Exception):  # noqa: N818 (the parameters are differentiated without factors)
    """A tensor does not hold the samples in one of its dimensions.

    Args:
        numbers: of parameters that it depends on.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        super().__init__("a tensor of the batch does not hold the samples in one dimension")
        self.numbers = set(numbers)


@dataclass(frozen=True)
class Layout:
    """The dimension with the samples, whose entries are in the order ``outer, B, inner``."""

    dim: int
    outer: int = 1
    inner: int = 1

    def of_all(self, tensor: Tensor, size: int, lead: int = 0) -> Tensor:
        """``[*lead, B, *one]``, where ``one`` is the shape for a batch with this sample alone."""
        dim = self.dim + lead
        if self.outer == self.inner == 1:
            return (tensor.movedim(dim, lead) if self.dim else tensor).unsqueeze(dim + 1)
        sizes = (self.outer, size, self.inner)
        apart: Tensor = tensor.unflatten(dim, sizes).movedim(dim + 1, lead)
        return apart.flatten(dim + 1, dim + 2)


Shared = None
"""In the place of a layout: all samples share the tensor."""


def layouts_between(shape: Size, size: int, other: Size, other_size: int) -> list[Layout | None]:
    """The layouts that a tensor may have, by its shapes in batches of two sizes."""
    if shape == other:
        return [Shared]
    if len(shape) != len(other):
        return []
    dims = [dim for dim, pair in enumerate(zip(shape, other, strict=True)) if pair[0] != pair[1]]
    count = shape[dims[0]] // size
    if len(dims) != 1 or (shape[dims[0]], other[dims[0]]) != (size * count, other_size * count):
        return []
    outers = [1, count, *(n for n in range(2, count) if count % n == 0)]
    return [Layout(dims[0], outer, count // outer) for outer in dict.fromkeys(outers)]


@dataclass(frozen=True)
class Site:
    """A tensor of an operation: its shape for one sample alone, and where a batch has samples."""

    func: Any
    one: Size
    layout: Layout | None

    def fits(self, func: Any, shape: Size, size: int) -> bool:
        """Is it this operation, and has the tensor this shape for a batch of this size?"""
        if func != self.func:
            return False
        if self.layout is None:
            return shape == self.one
        dim = self.layout.dim
        return (*self.one[:dim], size * self.one[dim], *self.one[dim + 1 :]) == tuple(shape)


Key: TypeAlias = tuple[int, str]
"""The number of an operation in its evaluation, and the name of one of its tensors."""

Sites: TypeAlias = dict[Key, Site | None]
"""What is known of the tensors of one kind of call; None for those that hold no samples."""

OUT = "out"


@dataclass
class Trace:
    """The operations of another batch, by number: what each was called with, and returned.

    Args:
        samples: numbers of the samples of this batch, of which the other batch is made: one of
            them, or all of them twice.
    """

    samples: list[int]
    calls: dict[int, tuple[Any, tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)

    def is_like(self, operations: Sequence[Any]) -> bool:
        """Did an evaluation call these functions, with values of other kinds in between?"""
        numbers = [number for number in self.calls if number >= 0]
        last = max(numbers, default=-1)
        are_same = all(n < len(operations) and operations[n] == self.calls[n][0] for n in numbers)
        return are_same and not any(callable(x) for x in operations[last + 1 :])

    def tensor(self, key: Key, func: Any, rule: Rule | None) -> Tensor | None:
        """A tensor of the operation with this number; None if that is another function."""
        number, name = key
        if number not in self.calls or self.calls[number][0] != func:
            return None
        _, args, kwargs = self.calls[number]
        named = {} if rule is None else rule.named(args, kwargs) or {}
        value = self.results.get(number) if name == OUT else named.get(name)
        return value if isinstance(value, Tensor) else None


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
        inside: numbers of some samples.
        pulled: for results of operations a cotangent ``[1, *z]``, pulled back from outputs with a
            cotangent that is zero for all other samples.
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
        every, other = seen.every.detach(), seen.other.detach()
        if layout is None:
            return are_near(other, every)
        numbers = layout.of_all(every, self.size)[self.samples]
        return are_near(layout.of_all(other, len(self.samples)), numbers)

    def _is_zero_outside(self, pulled: Tensor, layout: Layout) -> bool:
        outside = torch.ones(self.size, dtype=torch.bool, device=pulled.device)
        outside[self.inside] = False
        rest = layout.of_all(pulled[0], self.size)[outside]
        return not bool(((rest != 0) & ~rest.isnan()).any())


def _share(layout: Layout, shape: Size, other: Size) -> bool:
    """Have two tensors of one operation as many entries in the dimension of a layout?"""
    return layout.dim < min(len(shape), len(other)) and shape[layout.dim] == other[layout.dim]


def are_near(one: Tensor, other: Tensor) -> bool:
    """Do two tensors differ by rounding alone?"""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if torch.equal(one, other):
        return True
    is_equal = (one == other) | (one.isnan() & other.isnan())
    scale = torch.where(one.isfinite(), one, 0).abs().max()
    near = (one - other).abs() <= scale * torch.finfo(one.dtype).eps ** ROUNDING
    return bool((is_equal | near).all())
