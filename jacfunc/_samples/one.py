"""The call of one sample, made for all of them, and what came of it for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jacfunc._assembly import Grid, Sink
from jacfunc._calls import FlatCall
from jacfunc._torch import untracked
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
