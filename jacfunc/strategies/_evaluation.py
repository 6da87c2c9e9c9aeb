"""One call evaluated by a strategy, and its results put back into trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from jacfunc._assembly import NEW_TENSORS, Grid, Sink
from jacfunc._calls import FlatCall, OneTensor
from jacfunc._errors import Nameless, Refused, is_out_of_memory, out_of_memory
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Blocks, Leaves, Tree
from jacfunc.strategies._second import SecondCall
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

    call: FlatCall | SecondCall | OneTensor
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


def evaluate(
    api: str, call: FlatCall | SecondCall, strategy: Strategy, sink: Sink = NEW_TENSORS
) -> Evaluation:
    """The Jacobian of a call by a strategy, with the outputs."""
    operator = JacobianOperator(call, call.primals)
    blocks = in_words_of(
        api, lambda: blocks_into(sink, strategy, operator), instead=way_out(strategy)
    )
    if sink.copies:
        blocks = sink.finished(blocks, Grid.of(operator.outputs, operator.primals), ())
    return Evaluation(call, blocks, operator.image, sink)


SWEPT = "the function must be one that this strategy can sweep"
ANOTHER = " Let jacobian(strategy='auto') choose, or name another strategy."
NONE_LEFT = " Use other operations: no strategy is left to try."
SMALLER = " Take it in chunks (memory=, chunk_size=), of fewer leaves, or products (jvp, vjp)."


def way_out(strategy: Strategy) -> str:
    """What to do where a strategy is refused: one that chooses has tried all others."""
    is_chosen = isinstance(strategy, Sweeping) or not isinstance(strategy, Streaming)
    return ANOTHER if is_chosen else NONE_LEFT


def in_words_of(
    api: str,
    sweep: Callable[[], ResultT],
    must: str = SWEPT,
    instead: str = ANOTHER,
    smaller: str = SMALLER,
) -> ResultT:
    """The result of a sweep; its errors are those of :func:`worded`."""
    try:
        return sweep()
    except WORDLESS as error:
        if not _lacks_words(api, error):
            raise
        raise _in_words(api, error, must, instead, smaller) from error


@contextmanager
def worded(api: str, must: str = SWEPT, instead: str = NONE_LEFT) -> Iterator[None]:
    """A context of which errors begin with the name of the public function, and say what to do.

    Raises:
        Refused: if torch refuses.
        ValueError: in the place of an error without the name of a public function: for a budget
            that is too small, or a user's strategy that returns no blocks.
        RuntimeError: if memory ran out.
    """
    try:
        yield
    except WORDLESS as error:
        if not _lacks_words(api, error):
            raise
        raise _in_words(api, error, must, instead, SMALLER) from error


WORDLESS = Nameless, RuntimeError, MemoryError  # a refusal is a RuntimeError, too


def _lacks_words(api: str, error: Exception) -> bool:
    """Is it an error of ours, or of an allocator, that no public function has worded yet?"""
    if isinstance(error, Nameless):
        return True
    if isinstance(error, Refused):  # by a public function inside
        return not (isinstance(error.__cause__, Refused) or str(error).startswith(f"{api}: "))
    return is_out_of_memory(error) and not isinstance(error.__cause__, RuntimeError | MemoryError)


def _in_words(api: str, error: Exception, must: str, instead: str, smaller: str) -> Exception:
    if isinstance(error, Nameless):
        return ValueError(f"{api}: {error}")
    if isinstance(error, Refused):
        return Refused(f"{api}: {must}, got a refusal: {error}.{instead}")
    return out_of_memory(api, error, smaller)
