"""Plans of earlier calls, for later calls of the same kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

from torch import nn

from jacfunc._calls import fingerprint
from jacfunc._linear_map import JacobianOperator
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._memory import Chunk, FittedChunks
from jacfunc._planning.budget import is_bounded
from jacfunc._planning.plan import Plan, ResultT, Timing, attempt
from jacfunc._remembered import CallKind, Recent, Remembered
from jacfunc._torch import is_outermost
from jacfunc._types import Memory
from jacfunc._units import in_seconds
from jacfunc.strategies import Strategy, Structured

Planned = tuple[Plan, Chunk]
"""A plan, and with how many samples at once it runs."""

MOST_CODES = 1000
"""Fingerprints of functions whose plans are kept."""

CLEARLY = 0.95
"""A plan that is tried once must take less than this part of the best of several runs."""

SETTLING = 1.2
"""A plan by layers is timed before it is written down, and takes so many times less then."""

FAR = 3.0
"""A forecast that is wrong by this factor says little of which plan is the fastest."""


class Planner(Protocol):
    """A strategy that makes plans, within a budget if it has one; equal ones share plans."""

    @property
    def memory(self) -> Memory: ...

    def plan(self, operator: JacobianOperator) -> Plan: ...


class Code:
    """Stands for all functions of one fingerprint, as the owner of their plans."""


def by_memory(
    strategy: Planner,
    kind: CallKind,
    make: Callable[[], Planned],
    run: Callable[[Plan, Chunk], ResultT],
    clock: Callable[[], float] = time.perf_counter,
    warms_up: bool = False,
) -> ResultT:
    """What ``run`` returns for the plan of an earlier call of this kind, or for a new one.

    The first calls after the one that plans are timed, where nothing is added to a transform's
    work. Where the forecast was far off, the plan's second may get a try, and the faster of the two
    is kept. With ``warms_up`` the second runs once before, while torch sets things up.
    """
    recalled = recall(strategy, kind)
    if recalled is not None and not recalled[0].timing.left:  # as in most calls
        plan, chunk = recalled
        ran, result = attempt(plan, lambda each: run(each, chunk))
        if ran is not plan:
            remember(strategy, kind, (ran, chunk))
        return result
    # a first call evaluates more than once, with the same random numbers
    with alone() if recalled is None else nullcontext():
        planned = recalled or make()
        plan, chunk = planned
        is_timed = recalled is not None and plan.timing.left > 0 and is_outermost()
        for _ in range(2 if warms_up and plan.timing.before is not None else 1):
            start = clock() if is_timed else 0.0
            ran, result = attempt(plan, lambda each: run(each, chunk))
            if ran is not plan:
                break
    if ran is not plan:
        following = plan.timing.before or (ran, chunk)
    else:
        following = following_run(planned, clock() - start) if is_timed else planned
    if recalled is None or following is not planned:
        remember(strategy, kind, following)
    return result


def by_second(
    strategy: Planner, kind: CallKind, run: Callable[[Plan, Chunk], ResultT]
) -> ResultT | None:
    """What ``run`` returns for the second of a plan that stays; None if it has none, or fails."""
    plan, _ = recall(strategy, kind) or (None, None)
    if plan is None or plan.second is None:
        return None
    try:
        return run(replace(plan.second, timing=plan.timing), None)
    except Exception as error:  # nobody has asked for it
        note("%s, the second choice, is not tried: %s", plan.second.strategy, error)
        return None


def has_near_second(plan: Plan) -> bool:
    """May the second choice be faster than a plan that stays, once calls by both are settled?

    Layers may be: they are written down then, and samples under vmap are not.
    """
    second = plan.second
    if second is None or plan.seconds is None or second.seconds is None or plan.timing.left:
        return False
    return isinstance(second.strategy, Structured) and second.seconds < FAR * plan.seconds


def following_run(planned: Planned, seconds: float) -> Planned:
    """What the next call takes, after a run that took so many seconds."""
    plan, chunk = planned
    best, left, before = plan.timing
    timed = replace(plan, timing=Timing(min(best, seconds), left - 1))
    took, second = timed.timing.seconds, plan.second
    if before is not None:
        return (timed, chunk) if _later(timed) < CLEARLY * _later(before[0]) else before
    if timed.timing.left or second is None or not _may_be_faster(second, plan, took):
        return timed, chunk
    note("%s took %s, so %s is tried", plan.strategy, in_seconds(took), second.strategy)
    reason = f"{second.reason}; {plan.strategy} took {in_seconds(took)}"
    tried = replace(second, reason=reason, timing=Timing(left=1, before=(timed, chunk)))
    return tried, None


def _later(plan: Plan) -> float:
    """Seconds that a timed plan will take in later calls."""
    by_layers = isinstance(plan.strategy, Structured)
    return plan.timing.seconds / (SETTLING if by_layers else 1.0)


def _may_be_faster(second: Plan, plan: Plan, took: float) -> bool:
    """Is the plan's forecast so wrong that the second may be faster?

    A machine that was measured while it was busy makes all forecasts too long, and no order of them
    is certain.
    """
    if plan.seconds is None or second.seconds is None:
        return False
    if took > FAR * plan.seconds:
        return second.seconds < took
    return FAR * took < plan.seconds and second.seconds < FAR * plan.seconds


def recall(strategy: Planner, call: CallKind) -> Planned | None:
    """The plan of an earlier call of this kind, by this strategy or by an equal one."""
    own = own_plans().get_or_make(strategy, None, Remembered)
    planned = own.get(call.callable, call.kind)
    if planned is None and (strategy.memory is None or isinstance(call.callable, nn.Module)):
        planned = shared_plans().get(_owner(call.callable), (strategy, call.kind))
        if planned is not None:
            own.put(call.callable, call.kind, planned)
    return planned


def settled_by_plan(strategy: Planner, call: CallKind) -> Strategy | None:
    """The strategy of a plan that stays; None where there is none, or another may get a try."""
    planned = recall(strategy, call)
    return None if planned is None or planned[0].timing.left else planned[0].strategy


def remember(strategy: Planner, call: CallKind, planned: Planned) -> None:
    """Keep a plan: for equal strategies, too, unless it keeps to what was free when it was made.

    Within a budget functions of one code share none: they may differ in what they take, by what
    they find in globals.
    """
    own_plans().get_or_make(strategy, None, Remembered).put(call.callable, call.kind, planned)
    plan, chunk = planned
    is_fitted = is_bounded(plan) or (isinstance(chunk, FittedChunks) and not chunk.counts_products)
    has_budget = strategy.memory is not None
    if isinstance(call.callable, nn.Module) if has_budget else not is_fitted:
        shared_plans().put(_owner(call.callable), (strategy, call.kind), planned)


@cache
def shared_plans() -> Remembered[Planned]:
    """Plans that equal strategies share: by module or code, strategy and kind of call."""
    return Remembered()


@cache
def own_plans() -> Remembered[Remembered[Planned]]:
    """Plans of one strategy object: by function or module and kind of call.

    They hold the shared ones, too: no strategies are compared to find them.
    """
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
