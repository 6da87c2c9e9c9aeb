"""Halves of a batch, whose other samples are replaced, and groups, whose others get zeros.

And numbers that belong to a half, which must not change with the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from jacfunc._factored import FactoredJacobian
from jacfunc._memory import LEAST_SWEPT_BYTES, at_most, evenly
from jacfunc._rounding import are_near
from jacfunc._types import Leaves

MOST_HALVES = 6
"""Halves of one check. Of up to 20 samples, for each ordered pair one half has the first alone."""

ROUGHLY = 2 / 3
"""Other operations round numbers otherwise by less than this power of the precision."""


@dataclass(frozen=True)
class Half:
    """A half of the samples, and the batch in which samples from inside replace the others.

    Args:
        inside: numbers of the samples that stay.
        outside: numbers of the samples that are replaced.
        sources: for each place of the other batch, the number of the sample that it gets.
        is_of_unbatched: are outputs compared that have no batch in front, not those that have one?
    """

    inside: Tensor
    outside: Tensor
    sources: Tensor
    is_of_unbatched: bool = False

    @classmethod
    def of(cls, is_inside: Tensor, generator: torch.Generator) -> Half:
        inside, outside = is_inside.nonzero()[:, 0], (~is_inside).nonzero()[:, 0]
        sources = torch.arange(len(is_inside), device="cpu")
        drawn = torch.randint(len(inside), outside.shape, generator=generator, device="cpu")
        sources[outside] = inside[drawn]
        return cls(inside, outside, sources)

    def other(self, generator: torch.Generator) -> Half:
        """The half of all other samples, which stay while those inside this one are replaced."""
        is_inside = torch.ones(len(self.sources), dtype=torch.bool, device="cpu")
        is_inside[self.inside] = False
        return replace(Half.of(is_inside, generator), is_of_unbatched=self.is_of_unbatched)

    def compares(self, out: Tensor) -> bool:
        """Is this output compared? One number for the whole batch is not."""
        return out.dim() > 0 and has_batch(out, len(self.sources)) != self.is_of_unbatched

    def rows(self, out: Tensor) -> Tensor | None:
        """The rows of an output that are compared; None if none are."""
        if not self.compares(out):
            return None
        return out if self.is_of_unbatched else at(out, self.inside, 0)

    def cotangents(self, outputs: Leaves, number: int) -> Leaves:
        """Random cotangents; those of rows that are not compared are zero."""
        seeds = []
        for out in outputs:
            if not self.compares(out):
                seeds.append(torch.zeros_like(out))
                continue
            generator = torch.Generator(out.device).manual_seed(number)
            seed = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
            if not self.is_of_unbatched:
                seed.index_fill_(0, self.outside.to(out.device), 0)
            seeds.append(seed)
        return tuple(seeds)


@dataclass(frozen=True)
class Quantity:
    """Numbers that belong to a half of the samples: outputs, or gradients.

    Args:
        what: a name of it, for messages.
        is_sum: is it a sum over all samples? Those outside have cotangents of zero, but an infinite
            derivative of one of them makes it nan.
        must_be_zero: is it a gradient in the samples outside?
    """

    what: str
    tensor: Tensor
    is_sum: bool = False
    must_be_zero: bool = False

    def agrees(self, other: Quantity) -> bool:
        """Is it that of the other batch to the last bit, but for the sign of zero?

        A nan agrees with a nan.
        """
        return self._is_near(other, None, self.is_sum or self.must_be_zero)

    def agrees_roughly(self, other: Quantity) -> bool:
        """Is it that of the other batch up to the rounding of other operations?"""
        return self._is_near(other, ROUGHLY, self.is_sum)

    def _is_near(self, other: Quantity, power: float | None, may_be_nan: bool) -> bool:
        numbers = self.tensor
        expected = torch.zeros_like(numbers) if self.must_be_zero else other.tensor
        is_exact = power is None
        if numbers.shape != expected.shape or (is_exact and numbers.dtype != expected.dtype):
            return False
        if may_be_nan and not torch.equal(numbers, expected):
            is_nan = numbers.isnan() | expected.isnan()
            numbers, expected = (x.masked_fill(is_nan, 0) for x in (numbers, expected))
        return are_near(numbers, expected, power)

    def is_same_as(self, again: Quantity) -> bool:
        """Does another evaluation of this batch give the same, bit by bit?"""
        return replace(self, must_be_zero=False).agrees(again)

    def is_roughly(self, again: Quantity) -> bool:
        """Does another evaluation of this batch give the same up to rounding?"""
        return replace(self, must_be_zero=False).agrees_roughly(again)


def halves(size: int, generator: torch.Generator) -> list[Half]:
    """Random halves of the samples: for any two samples, one half has the first without the second.

    Each sample lies in half of the halves, and each in other ones: no such choice of halves
    contains another (Sperner 1928). Of more samples than there are choices, some lie in the same.
    """
    count = next(n for n in range(2, size + 2) if comb(n, n // 2) >= size or n == MOST_HALVES)
    choices = list(combinations(range(count), count // 2))
    total = len(choices)
    order = torch.randperm(max(size, total), generator=generator, device="cpu")[:size] % total
    own = [choices[i] for i in order.tolist()]
    every = [torch.tensor([n in choice for choice in own], device="cpu") for n in range(count)]
    return [Half.of(x, generator) for x in every if 0 < int(x.sum()) < size]


def has_batch(out: Tensor, size: int) -> bool:
    """Has an output a row for each sample?"""
    return out.dim() > 0 and out.shape[0] == size


def at(leaf: Tensor, numbers: Tensor, dim: int) -> Tensor:
    """The samples of a leaf that have these numbers, in a dimension."""
    return leaf.index_select(dim, numbers.to(leaf.device))


class PulledGroups:
    """What cotangents of groups of samples are pulled back to, some groups at a time.

    The group of all samples comes first. All groups at once would take several times the memory of
    the rows that are asked for.
    """

    def __init__(self, jacobian: FactoredJacobian, noises: Leaves) -> None:
        self._pull, self._noises = jacobian.linearization.pull_batch, noises
        inside = groups_of(jacobian.size).flip(0)
        at_once = evenly(len(inside), 2 * jacobian.nbytes, at_most(LEAST_SWEPT_BYTES))
        is_whole = at_once == len(inside)
        self._every = [inside] if is_whole else [inside[:1], *inside[1:].split(at_once)]
        self._kept: Leaves | None = None

    def groups(self) -> Iterator[tuple[Tensor, Leaves]]:
        """Which samples are in each group, ``[K, B]``, and products ``[K, *z]``."""
        for inside in self._every:
            products = self._kept or self._pull(_within(inside, self._noises))
            if len(self._every) == 1:
                self._kept = products
            yield inside, products
            del products


def _within(inside: Tensor, noises: Leaves) -> Leaves:
    """Cotangents ``[K, B, *out]``, zero outside of each group."""
    cotangents = []
    for noise in noises:
        groups = inside.to(noise.device).reshape(*inside.shape, *(1,) * (noise.dim() - 1))
        cotangents.append(torch.where(groups, noise, 0))
    return tuple(cotangents)


def groups_of(size: int) -> Tensor:
    """Groups ``[K, B]`` of samples: for any two samples, one has the first without the second.

    They go by the bits of the samples' numbers. The last group has all samples.
    """
    bits = torch.arange((size - 1).bit_length(), device="cpu").unsqueeze(1)
    ones = (torch.arange(size, device="cpu") >> bits & 1).bool()
    return torch.cat([ones, ~ones, torch.ones(1, size, dtype=torch.bool, device="cpu")])
