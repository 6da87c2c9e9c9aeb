"""The one way for data to flow: trees → leaves → linear map → strategy → blocks → trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from jacfunc._assembly import Grid, Sink, sink_for
from jacfunc._calls import FlatCall
from jacfunc._errors import Refused
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Argnums, Blocks, Leaves, Tree
from jacfunc.strategies import Strategy

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


def deriving(
    api: str,
    func: Callable[..., Any],
    argnums: Argnums,
    strategy: Strategy,
    has_aux: bool,
    pack: Callable[[Evaluation], Any],
    out: Tree = None,
) -> Callable[..., Any]:
    """A function of the same arguments as ``func`` that packs its evaluation."""

    # a module's __dict__ is its parameters: they are no attributes of the transformed function
    @wraps(func, updated=())
    def derived(*args: Tree, **kwargs: Any) -> Any:
        call = FlatCall(api, func, argnums, has_aux, args, kwargs)
        sink = None if out is None else sink_for(api, out)
        return pack(evaluate(api, call, strategy, sink))

    return derived


def watches_itself(func: Any) -> bool:
    """Is it a derivative of ours, which watches what it derives?"""
    return getattr(func, "__globals__", None) is globals()


def jacobian_by(
    api: str,
    func: Callable[..., Any],
    argnums: Argnums,
    strategy: Strategy,
    has_aux: bool,
    out: Tree = None,
) -> Callable[..., Any]:
    """The function that every door but value_and_jacobian returns."""

    def pack(evaluation: Evaluation) -> Any:
        if not has_aux:
            return evaluation.jacobian()
        _, aux = evaluation.value_and_aux()
        return evaluation.jacobian(), aux

    return deriving(api, func, argnums, strategy, has_aux, pack, out)


def in_words_of(api: str, sweep: Callable[[], Result]) -> Result:
    """Run a sweep; say in the words of the call what torch refused."""
    try:
        return sweep()
    except Refused as refusal:
        is_said = isinstance(refusal.__cause__, Refused)  # by an inner door
        if is_said or str(refusal).startswith(f"{api}: "):
            raise
        raise Refused(
            f"{api}: the function must be one that this strategy can sweep, got a refusal: "
            f"{refusal}. Let jacobian(strategy='auto') choose, or name another strategy."
        ) from refusal
