"""The call of one sample, made for all of them: what came of it, one by one, the first again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._assembly import Grid, Sink
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._linear_map import (
    EVERY,
    JacobianOperator,
    LeafNumbers,
    Linearization,
    Samples,
    check_agreement,
    detached,
    linearize,
    narrowed,
    one_sample,
)
from jacfunc._torch import RandomState, sweep_batch, untracked
from jacfunc._types import Leaves
from jacfunc.strategies import Evaluation, Strategy, evaluate

ALONE_ROUNDING = 2 / 3
"""A sample alone differs from the sample in a batch by less than this power of the precision."""

SAME_EACH_TIME = (
    "each evaluation must give the same",
    " Draw from torch's default generators, and keep nothing from call to call.",
)
"""What must hold of evaluations of the same samples, and what to do."""


class OneSample:
    """The call of one sample, under vmap or again and again; ``call`` is the last.

    That one has the trees of the output, and the sizes of its leaves.
    """

    call: FlatCall
    _grid: Grid

    def __init__(self, api: str, call_of: Callable[[Leaves], FlatCall]) -> None:
        self._api, self._call_of = api, call_of

    def blocks(self, leaves: Leaves, strategy: Strategy) -> Leaves:
        """Blocks, outputs and extras of one sample, one after the other."""
        # the call before remembers its outputs, and these their graph: it must go first
        self.call = self._call_of(leaves)
        evaluation = evaluate(self._api, self.call, strategy)
        outputs, extras = evaluation.image()
        self._grid = Grid.of(outputs, self.call.primals)
        return (*(block for row in evaluation.blocks for block in row), *outputs, *extras)

    def of_params(self, params: Leaves, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Outputs and extras of one sample at these parameters."""
        with untracked():
            self.call = self._call_of(leaves)
        outputs, extras = self.call(*params)
        with untracked():
            self._grid = Grid.of(outputs, self.call.primals)
        return outputs, extras

    def take_call(self, call: FlatCall, outputs: Leaves, primals: Leaves) -> None:
        """Take the trees of a call that was made elsewhere, and the sizes of one sample."""
        self.call, self._grid = call, Grid.of(outputs, primals)

    def grid(self) -> Grid:
        """The sizes of the leaves of one sample."""
        return self._grid

    def outputs_in(self, leaves: Leaves) -> Leaves:
        """The outputs among what :meth:`blocks` returned."""
        start = len(self._grid.rows) * len(self._grid.columns)
        return leaves[start : start + len(self._grid.rows)]


@dataclass(eq=False)
class SampleBlocks:
    """Blocks, outputs and extras of all samples, one after the other, each with the batch in front.

    ``size`` is the number of samples, and ``one`` the call that they were taken from.
    """

    leaves: Leaves
    size: int
    one: OneSample

    def evaluation(self, sink: Sink) -> Evaluation:
        """The finished Jacobian, and what the call returned."""
        grid = self.one.grid()
        count, width = len(grid.rows), len(grid.columns)
        blocks = tuple(self.leaves[i * width : (i + 1) * width] for i in range(count))
        beside = self.leaves[count * width :]
        image = beside[:count], beside[count:]
        blocks = sink.finished(blocks, grid, (self.size,))
        return Evaluation(self.one.call, blocks, lambda: image, sink)


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


def check_each_alone(
    calls: Mapping[int, Callable[[], FlatCall]],
    random_state: RandomState,
    outputs: Leaves,
    power: float,
) -> None:
    """Raise Refused unless rows of outputs are those of calls of samples alone."""
    for row, make in calls.items():
        random_state.repeat()
        call = make()
        with torch.no_grad():
            alone, _ = call(*map(Tensor.clone, call.primals))
        check_agreement(tuple([out[row].detach() for out in outputs]), alone, power=power)
