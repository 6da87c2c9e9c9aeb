"""The call of one sample, made for all of them: what came of it, and samples one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._assembly import Grid, Sink
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._linear_map import EVERY, LeafNumbers, Linearization, linearize
from jacfunc._torch import RandomState, untracked
from jacfunc._types import Leaves
from jacfunc.strategies import Evaluation, Strategy, evaluate


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
