"""Where a tensor of a batch holds the samples: in which dimension, and in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeAlias

from torch import Size, Tensor


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


def layouts_between(shape: Size, size: int, other: Size, other_size: int) -> list[Layout | None]:
    """The layouts that a tensor may have, by its shapes in batches of two sizes.

    None in the place of a layout says that all samples share the tensor.
    """
    if shape == other:
        return [None]
    if len(shape) != len(other):
        return []
    dims = [dim for dim, pair in enumerate(zip(shape, other, strict=True)) if pair[0] != pair[1]]
    count = shape[dims[0]] // size
    if len(dims) != 1 or (shape[dims[0]], other[dims[0]]) != (size * count, other_size * count):
        return []
    small = [n for n in range(1, isqrt(count) + 1) if count % n == 0]
    outers = dict.fromkeys([1, count, *small, *(count // n for n in small)])
    return [Layout(dims[0], outer, count // outer) for outer in outers]


@dataclass(frozen=True)
class Site:
    """A tensor of an operation: its shape for one sample alone, and where a batch has samples."""

    func: Any
    one: Size
    layout: Layout | None


Key: TypeAlias = tuple[int, str]
"""The number of an operation in its evaluation, and the name of one of its tensors."""

Sites: TypeAlias = dict[Key, Site | None]
"""What is known of the tensors of one kind of call; None for those that hold no samples."""

OUT = "out"
