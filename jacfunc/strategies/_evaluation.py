"""One call evaluated by a strategy: blocks, outputs, and how they go back into trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from jacfunc._assembly import Grid, Sink
from jacfunc._calls import FlatCall
from jacfunc._errors import Refused
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc.strategies._strategy import Strategy

Result = TypeVar("Result")


@dataclass(slots=True)
class Evaluation:
    """All that one evaluation gave, put into trees when it is asked for."""

    call: FlatCall
    blocks: Blocks
    image: Callable[[], tuple[Leaves, Leaves]]
    """Outputs and extras."""
    sink: Sink | None = None
    """Where the blocks went."""

    @property
    def outputs(self) -> Leaves:
        """Differentiable leaves of what the function returned."""
        return self.image()[0]

    def value_and_aux(self) -> tuple[Tree, Tree]:
        """What the function itself returned."""
        return self.call.value(*self.image())

    def jacobian(self) -> Tree:
        """Output tree of input trees of blocks."""
        tree = self.call.jacobian(self.blocks)
        return tree if self.sink is None else self.sink.placed(tree)


def evaluate(api: str, call: FlatCall, strategy: Strategy, sink: Sink | None = None) -> Evaluation:
    """One call's Jacobian by a strategy, with all that comes beside it."""
    operator = JacobianOperator(call, call.primals, sink)
    blocks = in_words_of(api, lambda: strategy.materialize(operator))
    if sink is not None and sink.copies:
        blocks = sink.finished(blocks, Grid.of(operator.outputs, operator.primals), ())
    return Evaluation(call, blocks, operator.image, sink)


def in_words_of(
    api: str,
    sweep: Callable[[], Result],
    must: str = "the function must be one that this strategy can sweep",
    instead: str = " Let jacobian(strategy='auto') choose, or name another strategy.",
) -> Result:
    """What the sweep returns; a refusal of torch becomes one of the door, in its words."""
    try:
        return sweep()
    except Refused as refusal:
        is_said = isinstance(refusal.__cause__, Refused)  # by an inner door
        if is_said or str(refusal).startswith(f"{api}: "):
            raise
        raise Refused(f"{api}: {must}, got a refusal: {refusal}.{instead}") from refusal
