"""Samples in several pieces: the first is evaluated again at the end, to see if all are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from jacfunc._calls import FlatCall
from jacfunc._linear_map import (
    Dims,
    JacobianOperator,
    check_agreement,
    detached,
    narrowed,
    one_sample,
)
from jacfunc._torch import RandomState, sweep_batch
from jacfunc._types import Leaves, Randomness


def first_again(
    chunks: Iterable[Leaves],
    outputs_of: Callable[[Leaves], Leaves],
    evaluated: Callable[[int], Leaves],
) -> Iterator[Leaves]:
    """The chunks of samples; after the last of several the first is evaluated again.

    Samples of different chunks can't be compared, but what draws or counts anew in each returns
    something else for the first. ``evaluated(size)`` is that evaluation.

    Raises:
        Refused: at the end, if it returns anything else.
    """
    count, size, first = 0, 0, Leaves()
    for leaves in chunks:
        if not count:
            size, first = leaves[0].shape[0], detached(outputs_of(leaves))
        count += 1
        yield leaves
        del leaves  # or it would stay beside the next chunk
    if count > 1 and not torch.compiler.is_compiling():
        check_agreement(first, evaluated(size))


@dataclass(frozen=True)
class FirstSamples:
    """The first samples of a batch, to be evaluated once more.

    Args:
        call_of: the call of a single sample.
        draws: as random numbers stood when it was evaluated first.
    """

    call_of: Callable[[Leaves], FlatCall]
    leaves: Leaves
    dims: Dims
    randomness: Randomness
    draws: RandomState

    def outputs(self, size: int) -> Leaves:
        """Of so many, vmapped."""
        self.draws.repeat()
        few = narrowed(self.leaves, self.dims, 0, size)
        with torch.no_grad():
            return sweep_batch(self._of_one, few, self.randomness, self.dims)[0]

    def output(self, size: int) -> Leaves:
        """Of the first alone, which is never vmapped."""
        self.draws.repeat()
        with torch.no_grad():
            outputs, _ = self._of_one(one_sample(self.leaves, self.dims, 0))
        return tuple(out.unsqueeze(0) for out in outputs)

    def _of_one(self, leaves: Leaves) -> tuple[Leaves, Leaves]:
        call = self.call_of(leaves)
        return JacobianOperator(call, call.primals).outputs, ()
