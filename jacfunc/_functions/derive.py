"""The one way for data to flow: trees → leaves → linear map → strategy → blocks → trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from jacfunc._assembly import NEW_TENSORS, sink_for
from jacfunc._calls import FlatCall
from jacfunc._types import Argnums, Tree
from jacfunc.strategies import Evaluation, Strategy, evaluate


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
        sink = NEW_TENSORS if out is None else sink_for(api, out)
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
