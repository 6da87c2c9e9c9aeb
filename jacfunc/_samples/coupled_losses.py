"""A test of losses: whether the gradient in the outputs of a sample changes with other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._samples.comparing import Quantity
from jacfunc._samples.coupling import Coupling
from jacfunc._samples.halves import Half, at, halves
from jacfunc._torch import RandomState
from jacfunc._types import Leaves

GradientOf: TypeAlias = Callable[[Tensor, Tensor], Leaves]
"""``gradient_of(numbers, others)``: the loss's gradient in the outputs, at a batch that has in each
place the outputs of the sample of one number, and the targets of the sample of another number."""


def loss_coupling(gradient_of: GradientOf, outputs: Leaves, number: int) -> Coupling:
    """Whether the gradient in the outputs of some samples changes when the others are replaced.

    It must stay where the outputs of the others are replaced, and not their targets. Where targets
    are replaced, too, a mean over the targets that are not ignored has other weights: but a
    gradient of zero must stay zero.
    """
    size, random_state = len(outputs[0]), RandomState(outputs)
    if size == 1:
        return Coupling()
    generator = torch.Generator().manual_seed(number)
    in_order = torch.arange(size, device="cpu")

    def rows(whose_outputs: Tensor, whose_targets: Tensor, half: Half) -> list[Quantity]:
        random_state.repeat()
        leaves = gradient_of(whose_outputs, whose_targets)
        return [Quantity("gradients", at(leaf, half.inside, 0)) for leaf in leaves]

    def changes(half: Half) -> bool:
        own, other = rows(in_order, in_order, half), rows(half.sources, in_order, half)
        moved = rows(half.sources, half.sources, half)
        if not all(map(_have_same_zeros, own, moved)):
            return True
        if all(one.agrees(two) for one, two in zip(own, other, strict=True)):
            return False
        again = rows(in_order, in_order, half)
        triples = zip(own, other, again, strict=True)
        return any(a.is_same_as(c) or not a.agrees_roughly(b) for a, b, c in triples)

    # it costs little beside the module, so all halves are looked at: one sample may decide alone
    for half in halves(size, generator):
        if changes(half) or changes(half.other(generator)):
            return Coupling("gradients")
    random_state.repeat()
    return Coupling()


def _have_same_zeros(one: Quantity, other: Quantity) -> bool:
    """Do both have a gradient of zero for the same samples?"""
    first, second = [(x.tensor != 0).reshape(len(x.tensor), -1).any(1) for x in (one, other)]
    return torch.equal(first, second)
