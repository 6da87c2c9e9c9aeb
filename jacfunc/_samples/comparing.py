"""A batch evaluated twice, and what of some samples must be the same both times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from jacfunc._linear_map import batch_size, differentiable_alias
from jacfunc._torch import RandomState, math_attention, recording, run_backward
from jacfunc._types import Leaves, is_differentiable

MOST_HALVES = 6
"""Halves of one check: each ordered pair of up to 20 samples is parted by one of them."""

WholeBatch = Callable[[Leaves, Leaves], Leaves]
"""The differentiable outputs of a batch, from parameters and the tensors of a call."""


@dataclass(frozen=True)
class Subject:
    """A module at a batch, evaluated as a user would."""

    whole: WholeBatch
    params: Leaves
    leaves: Leaves
    dims: Sequence[int | None]
    width: int = 1
    """Numbers that a sample is differentiated by."""
    by_inputs: bool = True
    """Are tensors of the call differentiated?"""
    as_evaluated: Callable[[], Callable[[], None]] | None = None
    """After an evaluation it returns what its pullbacks need called before them."""

    @property
    def size(self) -> int:
        """How many samples there are."""
        return batch_size(self.leaves, self.dims)

    def of(self, numbers: Tensor) -> Subject:
        """Other samples, by their numbers."""
        pairs = zip(self.leaves, self.dims, strict=True)
        return replace(self, leaves=tuple(x if d is None else at(x, numbers, d) for x, d in pairs))

    def evaluated(self, draws: RandomState) -> BatchGraph:
        """On a graph that leads to all that is differentiable."""
        draws.repeat()
        # other threads may have chosen the plain formula, and leave it between two evaluations
        with recording(), math_attention():
            leaves = self.leaves if self.by_inputs else ()
            followed = {id(x) for x in (*self.params, *leaves) if is_differentiable(x)}
            every = (*self.params, *self.leaves)
            anchors = tuple(
                differentiable_alias(x, False) if id(x) in followed else x for x in every
            )
            copies = tuple(x.clone() for x in anchors)  # a module may write into what it gets
            count = len(self.params)
            outputs = self.whole(copies[:count], copies[count:])
            renew = self.as_evaluated() if self.as_evaluated is not None else None
            return BatchGraph(outputs, anchors, count, self.dims, renew)


@dataclass(frozen=True)
class BatchGraph:
    """Outputs on their graph, and the tensors that it leads to."""

    outputs: Leaves
    anchors: Leaves
    num_params: int
    dims: Sequence[int | None]
    renew: Callable[[], None] | None = None
    """Puts back what was evaluated: a backward pass may run the module again."""

    def pull(self, cotangents: Leaves) -> list[Tensor | None]:
        """Gradients in the anchors; None where there is none."""
        live = [i for i, out in enumerate(self.outputs) if out.requires_grad]
        wanted = tuple(x for x in self.anchors if x.requires_grad)
        if not live or not wanted:
            return [None] * len(self.anchors)
        seeds = tuple(cotangents[i] for i in live)
        if self.renew is not None:
            self.renew()
        found = iter(run_backward(tuple(self.outputs[i] for i in live), wanted, seeds, False))
        grads = (next(found) if x.requires_grad else None for x in self.anchors)
        return [None if grad is None else grad.to_dense() for grad in grads]

    def seen_by(self, half: Half, cotangents: Leaves | None) -> list[Quantity]:
        """All that must not change with the samples outside the half; values alone without
        cotangents.
        """
        rows = (half.rows(out.detach()) for out in self.outputs)
        found = [Quantity("outputs", out) for out in rows if out is not None]
        if cotangents is None:
            return found
        grads = [
            torch.zeros_like(x) if grad is None and x.requires_grad else grad
            for x, grad in zip(self.anchors, self.pull(cotangents), strict=True)
        ]
        own, of_leaves = grads[: self.num_params], grads[self.num_params :]
        for grad, dim in zip(of_leaves, self.dims, strict=True):
            if grad is not None and dim is not None:
                found.append(Quantity("derivatives in inputs", at(grad, half.inside, dim)))
                outside = at(grad, half.outside, dim)
                found.append(Quantity("derivatives in inputs", outside, must_be_zero=True))
        shared = [grad for grad, d in zip(of_leaves, self.dims, strict=True) if d is None]
        sums = [grad for grad in (*own, *shared) if grad is not None]
        return found + [Quantity("derivatives in parameters", grad, is_sum=True) for grad in sums]


@dataclass(frozen=True)
class Quantity:
    """Something of a half of the samples.

    Args:
        is_sum: over samples, those outside with cotangents of zero: an infinite derivative of one
            of them makes it nan.
        must_be_zero: it belongs to the samples outside.
    """

    what: str
    tensor: Tensor
    is_sum: bool = False
    must_be_zero: bool = False

    def agrees(self, other: Quantity) -> bool:
        """To the last bit, but for the sign of zero; nan agrees with nan."""
        mine, its = self.tensor, self._right(other)
        if torch.equal(mine, its):
            return True
        if mine.shape != its.shape or mine.dtype != its.dtype:
            return False
        nan, its_nan = mine.isnan(), its.isnan()
        is_lost = self.is_sum or self.must_be_zero
        same = (mine == its) | ((nan | its_nan) if is_lost else (nan & its_nan))
        return bool(same.all())

    def agrees_roughly(self, other: Quantity) -> bool:
        """To the rounding of other operations."""
        mine, its = self.tensor, self._right(other)
        if mine.shape != its.shape:
            return False
        nan, its_nan = mine.isnan(), its.isnan()
        is_lost = (nan | its_nan) if self.is_sum else (nan & its_nan)
        apart, sizes = (mine - its).abs(), torch.cat((mine.flatten(), its.flatten())).abs()
        rounding = torch.finfo(mine.dtype).eps ** (2 / 3) * sizes.nan_to_num(0.0, 0.0).max()
        return bool(((apart <= rounding) | (mine == its) | is_lost).all())

    def is_same_as(self, again: Quantity) -> bool:
        """Does another evaluation give it, bit by bit?"""
        return replace(self, must_be_zero=False).agrees(again)

    def is_roughly(self, again: Quantity) -> bool:
        """Does another evaluation give it, but for rounding?"""
        return replace(self, must_be_zero=False).agrees_roughly(again)

    def _right(self, other: Quantity) -> Tensor:
        return torch.zeros_like(self.tensor) if self.must_be_zero else other.tensor


@dataclass(frozen=True)
class Half:
    """Numbers of the samples that stay, of those that do not, and of what takes each place."""

    inside: Tensor
    outside: Tensor
    sources: Tensor
    sees_apart: bool = False
    """Are outputs compared that have no batch in front, instead of those that have one?"""

    @classmethod
    def of(cls, is_inside: Tensor, generator: torch.Generator) -> Half:
        inside, outside = is_inside.nonzero()[:, 0], (~is_inside).nonzero()[:, 0]
        sources = torch.arange(len(is_inside), device="cpu")
        drawn = torch.randint(len(inside), outside.shape, generator=generator, device="cpu")
        sources[outside] = inside[drawn]
        return cls(inside, outside, sources)

    def other(self, generator: torch.Generator) -> Half:
        """The samples outside stay."""
        is_inside = torch.ones(len(self.sources), dtype=torch.bool, device="cpu")
        is_inside[self.inside] = False
        return replace(Half.of(is_inside, generator), sees_apart=self.sees_apart)

    def sees(self, out: Tensor) -> bool:
        """Is it compared? What is one number for the whole batch is not."""
        return out.dim() > 0 and has_batch(out, len(self.sources)) != self.sees_apart

    def rows(self, out: Tensor) -> Tensor | None:
        """What is compared of an output, if anything is."""
        if not self.sees(out):
            return None
        return out if self.sees_apart else at(out, self.inside, 0)

    def cotangents(self, outputs: Leaves, number: int) -> Leaves:
        """Random, and zero for what is not compared."""
        found = []
        for out in outputs:
            if not self.sees(out):
                found.append(torch.zeros_like(out))
                continue
            generator = torch.Generator(out.device).manual_seed(number)
            seed = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
            if not self.sees_apart:
                seed.index_fill_(0, self.outside.to(out.device), 0)
            found.append(seed)
        return tuple(found)


def halves(size: int, generator: torch.Generator) -> Iterator[Half]:
    """Random halves of the samples, of which for any two samples one holds the first alone.

    Each sample is given another choice of half of the halves, and no such choice contains another
    (Sperner 1928). Of more samples than there are choices, some get the same.
    """
    count = next(n for n in range(2, size + 2) if comb(n, n // 2) >= size or n == MOST_HALVES)
    choices = list(combinations(range(count), count // 2))
    order = torch.randperm(max(size, len(choices)), generator=generator, device="cpu")[:size] % len(
        choices
    )
    chosen = [choices[i] for i in order.tolist()]
    for number in range(count):
        is_inside = torch.tensor([number in choice for choice in chosen], device="cpu")
        if 0 < int(is_inside.sum()) < size:
            yield Half.of(is_inside, generator)


def has_batch(out: Tensor, size: int) -> bool:
    """Is there a row for each sample?"""
    return out.dim() > 0 and out.shape[0] == size


def at(leaf: Tensor, numbers: Tensor, dim: int) -> Tensor:
    return leaf.index_select(dim, numbers.to(leaf.device))
