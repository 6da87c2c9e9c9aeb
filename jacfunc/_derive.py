"""The one way for data to flow: trees → leaves → linear map → strategy → blocks → trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from jacfunc._check import Refused
from jacfunc._flat import FlatCall
from jacfunc._operators import JacobianOperator
from jacfunc._types import Argnums, Tree
from jacfunc.strategies import Strategy

Result = TypeVar("Result")


class Evaluation(NamedTuple):
    """All that one evaluation gave."""

    value: Tree
    aux: Tree
    jacobian: Tree


def deriving(
    api: str,
    func: Callable[..., Any],
    argnums: Argnums,
    strategy: Strategy,
    has_aux: bool,
    pack: Callable[[Evaluation], Any],
) -> Callable[..., Any]:
    """A function of the same arguments as ``func`` that packs its value, aux and Jacobian."""

    # a module's __dict__ is its parameters: they are no attributes of the transformed function
    @wraps(func, updated=())
    def derived(*args: Tree, **kwargs: Any) -> Any:
        call = FlatCall(api, func, argnums, has_aux, args, kwargs)
        operator = JacobianOperator(call, call.primals)
        blocks = carry_out(api, lambda: strategy.materialize(operator))
        value, aux = call.value(operator.outputs, operator.extras)
        return pack(Evaluation(value, aux, call.jacobian(blocks)))

    return derived


def jacobian_by(
    api: str, func: Callable[..., Any], argnums: Argnums, strategy: Strategy, has_aux: bool
) -> Callable[..., Any]:
    """The function that every door but value_and_jacobian returns."""

    def pack(evaluation: Evaluation) -> Any:
        return (evaluation.jacobian, evaluation.aux) if has_aux else evaluation.jacobian

    return deriving(api, func, argnums, strategy, has_aux, pack)


def carry_out(api: str, sweep: Callable[[], Result]) -> Result:
    """Run a sweep; say in the words of the call what torch refused."""
    try:
        return sweep()
    except Refused as refusal:
        if isinstance(refusal.__cause__, Refused):  # an inner door has said it already
            raise
        raise Refused(
            f"{api}: the function must be one that this strategy can sweep, got a refusal: "
            f"{refusal}. Let jacobian(strategy='auto') choose, or name another strategy."
        ) from refusal
