"""The way of data through a Jacobian: trees → leaves → linear map → strategy → blocks → trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from jacfunc._assembly import NEW_TENSORS, read_by, sink_for
from jacfunc._calls import Derivation, FlatCall
from jacfunc._showing import named
from jacfunc._types import SweepOptions, Tree
from jacfunc.strategies import (
    Evaluation,
    Forward,
    Reverse,
    SecondCall,
    SettledFunction,
    Strategy,
    evaluate,
)


class StrategyOptions(SweepOptions, total=False):
    """What Jacobians take by keyword whose strategy a user may choose."""

    strategy: str | Strategy


def deriving(
    derivation: Derivation,
    strategy: Strategy,
    pack: Callable[[Evaluation], Any],
    out: Tree = None,
    of: Callable[[FlatCall], SecondCall] | None = None,
) -> Callable[..., Any]:
    """A function of the arguments of ``func`` that returns what ``pack`` makes of the evaluation.

    Args:
        derivation: the function, and by which arguments it is differentiated.
        strategy: evaluates the call.
        pack: makes the result from the evaluation.
        out: tensors of an earlier result, to write into.
        of: makes a call that is evaluated instead from the call of ``func``: its derivative.
    """
    api = derivation.api
    settled = None
    if out is None and not (derivation.has_aux or torch.compiler.is_compiling()):
        settled = SettledFunction(derivation, strategy, 1 if of is None else 2)

    # a module's __dict__ is its parameters: they are no attributes of the transformed function
    @wraps(derivation.func, updated=())
    def derived(*args: Tree, **kwargs: Any) -> Any:
        if settled is not None and (known := settled.evaluation(args, kwargs)) is not None:
            return pack(known)
        flat = FlatCall(derivation, args, kwargs)
        call = flat if of is None else of(flat)
        read = partial(read_by, derivation.func, args, kwargs)
        sink = NEW_TENSORS if out is None else sink_for(api, out, read=read)
        evaluation = evaluate(api, call, strategy, sink)
        if settled is not None:
            settled.look_at(call, evaluation)
        return pack(evaluation)

    return named(api, derivation.func, derived)


def watches_itself(func: Any) -> bool:
    """Is ``func`` a derivative that :func:`deriving` made, which watches its own function?"""
    return getattr(getattr(func, "__code__", None), "co_filename", None) == __file__


def in_either_direction(derive: Callable[..., Any], derivation: Derivation) -> Callable[..., Any]:
    """A derivative by a strategy that chooses, on which both directions are noted for a compiler.

    Compiled code has no overhead of Python, so that the other direction may be the faster one.
    """
    if not torch.compiler.is_compiling():  # it can't trace that an attribute is set
        ways = partial(jacobian_by, derivation)
        vars(derive)["directions"] = lambda: tuple(map(ways, (Reverse(), Forward())))
    return derive


def jacobian_by(
    derivation: Derivation, strategy: Strategy, out: Tree = None, **of: Any
) -> Callable[..., Any]:
    """A function of the arguments of ``func`` that returns the Jacobian, or ``(jacobian, aux)``."""

    def pack(evaluation: Evaluation) -> Any:
        if not derivation.has_aux:
            return evaluation.jacobian()
        _, aux = evaluation.value_and_aux()
        return evaluation.jacobian(), aux

    return deriving(derivation, strategy, pack, out, **of)
