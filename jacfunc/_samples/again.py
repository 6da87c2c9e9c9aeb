"""Samples in several chunks: the first is evaluated again at the end, and must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from jacfunc._calls import FlatCall
from jacfunc._linear_map import (
    JacobianOperator,
    Samples,
    check_agreement,
    detached,
    narrowed,
    one_sample,
)
from jacfunc._torch import RandomState, sweep_batch
from jacfunc._types import Leaves

SAME_EACH_TIME = (
    "each evaluation must give the same",
    " Draw from torch's default generators, and keep nothing from call to call.",
)
"""What must hold of evaluations of the same samples, and what to do."""


def first_again(
    chunks: Iterable[Leaves],
    total: int,
    outputs_of: Callable[[Leaves], Leaves],
    evaluate_first: Callable[[int], Leaves],
) -> Iterator[Leaves]:
    """The chunks of samples; after the last of several the first is evaluated again.

    Samples of different chunks can't be compared. But a module that draws or counts anew in each
    chunk returns something else for the first.

    Args:
        total: how many samples all chunks have.
        outputs_of: finds the outputs in a chunk.
        evaluate_first: evaluates the first samples, so many, and returns their outputs.

    Raises:
        Refused: at the end, if that evaluation returns anything else.
    """
    count, size, first = 0, 0, Leaves()
    for leaves in chunks:
        if not count and (leaves and leaves[0].shape[0] < total):
            size, first = leaves[0].shape[0], detached(outputs_of(leaves))
        count += 1
        yield leaves
        del leaves  # or it would stay beside the next chunk
    if count > 1 and not torch.compiler.is_compiling():
        check_agreement(first, evaluate_first(size))


@dataclass(frozen=True)
class FirstSamples:
    """The first samples of a batch, to be evaluated once more.

    Args:
        call_of: makes the call of a single sample from the tensors of that sample.
        random_state: as it was before the first evaluation.
    """

    call_of: Callable[[Leaves], FlatCall]
    samples: Samples
    random_state: RandomState

    def outputs(self, size: int) -> Leaves:
        """The outputs of the first samples, so many, vmapped."""
        self.random_state.repeat()
        dims = self.samples.dims
        leaves = narrowed(self.samples.leaves, dims, 0, size)
        with torch.no_grad():
            return sweep_batch(self._of_one, leaves, self.samples.randomness, dims)[0]

    def output(self, size: int) -> Leaves:
        """The outputs of the first sample alone, never vmapped."""
        self.random_state.repeat()
        with torch.no_grad():
            outputs, _ = self._of_one(one_sample(self.samples.leaves, self.samples.dims, 0))
        return tuple(out.unsqueeze(0) for out in outputs)

    def _of_one(self, leaves: Leaves) -> tuple[Leaves, Leaves]:
        call = self.call_of(leaves)
        return JacobianOperator(call, call.primals).outputs, ()
