"""One call evaluated by a strategy, and its results put back into trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from jacfunc._assembly import NEW_TENSORS, Grid, Sink
from jacfunc._calls import FlatCall
from jacfunc._errors import Nameless, Refused, is_out_of_memory, out_of_memory
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc.strategies._strategy import Strategy, Streaming, Sweeping, blocks_into

ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class Evaluation:
    """Outputs and blocks of one call; its methods put them into trees.

    Args:
        call: the call, which knows the trees of its arguments and of its output.
        blocks: of the Jacobian.
        image: returns outputs and extras.
        sink: where the blocks went.
    """

    call: FlatCall
    blocks: Blocks
    image: Callable[[], tuple[Leaves, Leaves]]
    sink: Sink

    @property
    def outputs(self) -> Leaves:
        """Differentiable leaves of what the function returned."""
        return self.image()[0]

    def value_and_aux(self) -> tuple[Tree, Tree]:
        """The function's own output, and aux."""
        return self.call.value(*self.image())

    def jacobian(self) -> Tree:
        """The Jacobian: a tree like the output, of trees like the inputs, of blocks."""
        tree = self.call.jacobian(self.blocks)
        return self.sink.placed(tree) if self.sink.copies else tree


def evaluate(api: str, call: FlatCall, strategy: Strategy, sink: Sink = NEW_TENSORS) -> Evaluation:
    """The Jacobian of a call by a strategy, with the outputs."""
    operator = JacobianOperator(call, call.primals)
    blocks = in_words_of(
        api, lambda: blocks_into(sink, strategy, operator), instead=way_out(strategy)
    )
    if sink.copies:
        blocks = sink.finished(blocks, Grid.of(operator.outputs, operator.primals), ())
    return Evaluation(call, blocks, operator.image, sink)


ANOTHER = " Let jacobian(strategy='auto') choose, or name another strategy."
NONE_LEFT = " Use other operations: no strategy is left to try."
SMALLER = " Take it in chunks (memory=, chunk_size=), of fewer leaves, or products (jvp, vjp)."


def way_out(strategy: Strategy) -> str:
    """What to do where a strategy is refused: one that chooses has tried all others."""
    chooses = isinstance(strategy, Streaming) and not isinstance(strategy, Sweeping)
    return NONE_LEFT if chooses else ANOTHER


def in_words_of(
    api: str,
    sweep: Callable[[], ResultT],
    must: str = "the function must be one that this strategy can sweep",
    instead: str = ANOTHER,
    smaller: str = SMALLER,
) -> ResultT:
    """The result of a sweep; for its errors see :func:`worded`."""
    with worded(api, must, instead, smaller):
        return sweep()


@contextmanager
def worded(api: str, must: str, instead: str = NONE_LEFT, smaller: str = SMALLER) -> Iterator[None]:
    """A context of which errors begin with the name of the public function, and say what to do.

    Raises:
        Refused: if torch refuses.
        ValueError: if a budget is too small, or a user's strategy returns no blocks.
        RuntimeError: if memory ran out.
    """
    try:
        yield
    except Refused as refusal:
        is_worded = isinstance(refusal.__cause__, Refused)  # by a public function inside
        if is_worded or str(refusal).startswith(f"{api}: "):
            raise
        raise Refused(f"{api}: {must}, got a refusal: {refusal}.{instead}") from refusal
    except Nameless as error:  # whoever raised it does not know the door
        raise ValueError(f"{api}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        is_worded = isinstance(error.__cause__, RuntimeError | MemoryError)
        if is_worded or not is_out_of_memory(error):
            raise
        raise out_of_memory(api, error, smaller) from error
