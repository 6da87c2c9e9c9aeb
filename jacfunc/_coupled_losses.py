"""Does the gradient of a loss in the outputs of a sample change with those of others?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jacfunc._compared import Quantity, at, halves
from jacfunc._coupling import Found
from jacfunc._draws import Draws
from jacfunc._types import Leaves


def loss_coupling(gradient_of: Callable[[Leaves], Leaves], outputs: Leaves, number: int) -> Found:
    """The gradient in some samples' outputs, as the others are replaced and their targets stay."""
    size, draws = len(outputs[0]), Draws(outputs)
    if size == 1:
        return Found()
    generator = torch.Generator().manual_seed(number)
    half = next(halves(size, generator))

    def rows(sources: Tensor, inside: Tensor) -> list[Quantity]:
        draws.repeat()
        leaves = gradient_of(tuple(at(out, sources, 0) for out in outputs))
        return [Quantity("gradients", at(leaf, inside, 0)) for leaf in leaves]

    as_it_is = torch.arange(size, device="cpu")
    for some in (half, half.other(generator)):
        mine, its = rows(as_it_is, some.inside), rows(some.sources, some.inside)
        if all(one.agrees(two) for one, two in zip(mine, its, strict=True)):
            continue
        again = rows(as_it_is, some.inside)
        for one, two, same in zip(mine, its, again, strict=True):
            if one.is_same_as(same) or not one.agrees_roughly(two):
                return Found("gradients")
    draws.repeat()
    return Found()
