"""Does the gradient of a loss in the outputs of a sample change with other samples?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._samples.comparing import Half, Quantity, at, halves
from jacfunc._samples.coupling import Coupling
from jacfunc._torch import RandomState
from jacfunc._types import Leaves

GradientOf: TypeAlias = Callable[[Tensor, Tensor], Leaves]
"""In the outputs, of a batch made of the outputs of some samples and the targets of some."""


def loss_coupling(gradient_of: GradientOf, outputs: Leaves, number: int) -> Coupling:
    """The gradient in the outputs of some samples, as the others are replaced.

    While the targets of the others stay, it must stay. When these are replaced, too, weights may
    change, as those of a mean over the targets that are not ignored do; but what is zero, stays so.
    """
    size, draws = len(outputs[0]), RandomState(outputs)
    if size == 1:
        return Coupling()
    generator = torch.Generator().manual_seed(number)
    as_it_is = torch.arange(size, device="cpu")

    def rows(whose_outputs: Tensor, whose_targets: Tensor, half: Half) -> list[Quantity]:
        draws.repeat()
        leaves = gradient_of(whose_outputs, whose_targets)
        return [Quantity("gradients", at(leaf, half.inside, 0)) for leaf in leaves]

    def changes(half: Half) -> bool:
        mine, its = rows(as_it_is, as_it_is, half), rows(half.sources, as_it_is, half)
        moved = rows(half.sources, half.sources, half)
        if not all(map(_is_zero_where, mine, moved)):
            return True
        if all(one.agrees(two) for one, two in zip(mine, its, strict=True)):
            return False
        again = rows(as_it_is, as_it_is, half)
        pairs = zip(mine, its, again, strict=True)
        return any(a.is_same_as(c) or not a.agrees_roughly(b) for a, b, c in pairs)

    # it costs little beside the module, so all halves are looked at: one sample may decide alone
    for half in halves(size, generator):
        if changes(half) or changes(half.other(generator)):
            return Coupling("gradients")
    draws.repeat()
    return Coupling()


def _is_zero_where(mine: Quantity, its: Quantity) -> bool:
    """Have the same samples a gradient?"""
    one, two = [(x.tensor != 0).reshape(len(x.tensor), -1).any(1) for x in (mine, its)]
    return torch.equal(one, two)
