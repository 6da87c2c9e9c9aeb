"""Plans of earlier calls, for later calls of the same kind."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

from torch import nn

from jacfunc._calls import fingerprint
from jacfunc._memory import Chunk, FittedChunks
from jacfunc._planning.budget import is_bounded
from jacfunc._planning.plan import Plan
from jacfunc._remembered import CallKind, Recent, Remembered
from jacfunc._types import Memory

Planned = tuple[Plan, Chunk]
"""A plan, and with how many samples at once it runs."""

MOST_CODES = 1000
"""Fingerprints of functions whose plans are kept."""


class Planner(Protocol):
    """A strategy that makes plans: equal ones share them."""

    @property
    def memory(self) -> Memory: ...


class Code:
    """Stands for all functions of one fingerprint, as the owner of their plans."""


def recall(strategy: Planner, call: CallKind) -> Planned | None:
    """The plan of an earlier call of this kind, by this strategy or by an equal one."""
    own = own_plans().get_or_make(strategy, None, Remembered)
    planned = own.get(call.callable, call.kind)
    if planned is None and strategy.memory is None:
        planned = shared_plans().get(_owner(call.callable), (strategy, call.kind))
        if planned is not None:
            own.put(call.callable, call.kind, planned)
    return planned


def remember(strategy: Planner, call: CallKind, planned: Planned) -> None:
    """Keep a plan: for equal strategies, too, unless it keeps to a budget.

    A budget may be what was free when the plan was made; and functions of one code may differ in
    what they take, by what they find in globals.
    """
    own_plans().get_or_make(strategy, None, Remembered).put(call.callable, call.kind, planned)
    plan, chunk = planned
    is_fitted = is_bounded(plan) or isinstance(chunk, FittedChunks)
    if strategy.memory is None and not is_fitted:
        shared_plans().put(_owner(call.callable), (strategy, call.kind), planned)


@cache
def shared_plans() -> Remembered[Planned]:
    """By module or code, strategy and kind of call."""
    return Remembered()


@cache
def own_plans() -> Remembered[Remembered[Planned]]:
    """By strategy object, then by function or module and kind of call: looked up faster."""
    return Remembered()


def _owner(called: Any) -> Any:
    """What plans belong to: a module itself, or the code of functions.

    A function may be made anew at every call: those of one code have one plan. A module may do
    anything with what it keeps: another one is planned anew.
    """
    if isinstance(called, nn.Module):
        return called
    return _code_of().get_or_make(called, None, lambda: _code(fingerprint(called)))


def _code(key: str) -> Code:
    code = _codes().get(key)
    if code is None:
        code = Code()
        _codes().put(key, code)
    return code


@cache
def _code_of() -> Remembered[Code]:
    return Remembered()


@cache
def _codes() -> Recent[Code]:
    return Recent(MOST_CODES)
