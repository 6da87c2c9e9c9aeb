"""Samples evaluated alone, one after the other, where they run neither vmapped nor in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._calls import FlatCall, OfCalls
from jacfunc._linear_map import EVERY, LeafNumbers, Linearization, linearize
from jacfunc._torch import RandomState
from jacfunc._types import Leaves


@dataclass(frozen=True)
class EachSample:
    """Samples evaluated one by one, each on a graph of its own; cotangents are pulled back on each.

    Args:
        outputs: of all samples, ``[B, *out]``.
        extras: what was returned beside them, ``[B, …]``.
        linearizations: one a sample.
    """

    outputs: Leaves
    extras: Leaves
    linearizations: Sequence[Linearization]

    @classmethod
    def of(
        cls,
        calls: Sequence[Callable[[], FlatCall]],
        numbers: Sequence[int],
        random_state: RandomState,
        randomness: str,
    ) -> tuple[EachSample, FlatCall]:
        """The samples of these calls, differentiated by their primals with these numbers.

        Raises:
            Refused: if a sample draws random numbers under "error".
        """
        random_state.repeat()
        linearizations = []
        for make in calls:
            call = make()
            with random_state.of_one(randomness):
                linearizations.append(_linearized(call, numbers))
        pairs = zip(*(x.outputs for x in linearizations), strict=True)
        beside = zip(*(x.extras for x in linearizations), strict=True)
        outputs, extras = (tuple(map(torch.stack, leaves)) for leaves in (pairs, beside))
        return cls(outputs, extras, linearizations), call

    @classmethod
    def none(cls, call: FlatCall) -> EachSample:
        """No samples, of the shapes that the call of one shows."""
        with torch.no_grad():
            leaves = call(*map(Tensor.clone, call.primals))
        outputs, extras = (tuple(x.new_empty(0, *x.shape) for x in each) for each in leaves)
        return cls(outputs, extras, ())

    def pull_batch(
        self, cotangents: Leaves, onto: slice = EVERY, of: LeafNumbers = EVERY
    ) -> Leaves:
        """Products ``[K, B, *in]`` of cotangents ``[K, B, *out]`` of some outputs."""
        products = [
            linearization.pull_batch(tuple(seeds[:, b] for seeds in cotangents), onto, of)
            for b, linearization in enumerate(self.linearizations)
        ]
        return tuple(torch.stack(leaf, 1) for leaf in zip(*products, strict=True))


def _linearized(call: FlatCall, numbers: Sequence[int]) -> Linearization:
    """The call as a function of some of its primals, on its graph."""

    def of_some(*chosen: Tensor) -> tuple[Leaves, Leaves]:
        primals = list(call.primals)
        for number, primal in zip(numbers, chosen, strict=True):
            primals[number] = primal
        return call(*primals)

    return linearize(OfCalls(of_some, call.state), tuple(call.primals[n] for n in numbers))
