"""Functions that leave torch, by NumPy or Python numbers, and come back without a graph.

Torch takes what comes back for a constant, and so would its derivative be zero. A constant by its
nature has one, too: a function that leaves torch is evaluated beside the point, and only an output
that changes there is refused. What ``detach()`` or ``torch.no_grad()`` cut off stays a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import LeftTorch
from jacfunc._torch import RandomState
from jacfunc._types import LeafFunction, Leaves

WAYS_OUT: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.numpy,
        Tensor.__array__,
        Tensor.item,
        Tensor.tolist,
        Tensor.__float__,
        Tensor.__dlpack__,
    }
)
"""Calls that hand numbers of a tensor to other code than torch."""


def check_stays_in_torch(
    func: LeafFunction, primals: Leaves, outputs: Leaves, constants: Sequence[int]
) -> None:
    """Refuse outputs that torch takes for constants, if they change with the primals.

    Args:
        func: of the primals, returns outputs and extras; it has left torch.
        constants: the numbers of the outputs without a graph, or without tangents.

    Raises:
        LeftTorch: if one of them has another value on both sides of the point.
    """
    random_state = RandomState(primals)
    # a number that changes by less than its own rounding does not show it
    size = max(torch.finfo(x.dtype).eps for x in (*primals, *outputs)) ** 0.5

    def beside(step: int) -> list[Tensor]:
        random_state.repeat()
        with torch.no_grad():
            evaluated, _ = func(*_moved(primals, step * size))
        return [evaluated[number] for number in constants]

    with random_state.kept():
        sides = zip(beside(0), beside(1), beside(-1), strict=True)
        for number, (same, above, below) in zip(constants, sides, strict=True):
            # one that changes by itself tells nothing, nor does a step to one side
            if torch.equal(same, outputs[number]) and not (
                torch.equal(same, above) or torch.equal(same, below)
            ):
                raise LeftTorch(
                    "func must compute its outputs by torch, got one that went through NumPy or a "
                    "Python number and lost its graph: its derivative would be zero, though its "
                    "value changes. Compute it by torch, write a torch.autograd.Function, or "
                    "return it beside the outputs with has_aux=True."
                )


def _moved(primals: Leaves, step: float) -> list[Tensor]:
    """Copies of the primals, each entry moved by up to so much of its size, and of 1."""
    moved = []
    for primal in map(Tensor.detach, primals):
        # no entry moves as its neighbours do, and none is drawn at random, which vmap refuses
        ways = torch.arange(1, 1 + primal.numel(), device=primal.device).cos().view(primal.shape)
        moved.append(primal + step * (1 + primal.abs()) * ways.to(primal.dtype))
    return moved
