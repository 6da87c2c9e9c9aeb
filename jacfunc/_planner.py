"""``strategy="auto"``: above the strategies that it picks from."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from jacfunc._chunks import Chunk
from jacfunc._costs import Costs
from jacfunc._fingerprint import fingerprint
from jacfunc._forecast import Swept
from jacfunc._functorch import is_pushing, uncompiled
from jacfunc._lock import alone
from jacfunc._operators import JacobianOperator
from jacfunc._plans import (
    Direction,
    Plan,
    Sampled,
    attempt,
    bounded,
    bounded_samples,
    by_sizes,
    fastest,
    is_bounded,
    spared,
)
from jacfunc._trail import is_heard, note
from jacfunc._types import Blocks
from jacfunc._words import in_seconds
from jacfunc._work import Recorder, Unrecordable
from jacfunc.strategies import Forward, Reverse, Structured

MOST_FUNCTIONS = 1000


@dataclass(frozen=True)
class Auto:
    """Chooses by forecast, once for each kind of call, and goes on where torch refuses.

    Args:
        directions: strategies to choose from; where one has no chunk size, that is chosen too.
        memory: bytes that the call may take, its result among them; None for half of what is
            free on the device.
        by_layers: a further choice where samples are differentiated by parameters.
    """

    directions: tuple[Direction, ...] = (Reverse(), Forward())
    memory: int | None = None
    by_layers: Structured | None = None
    known: dict[Hashable, tuple[Plan, Chunk]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first plan that torch carries out."""
        if torch.compiler.is_compiling():
            return by_sizes(operator, self.directions).materialize(operator)
        signature = operator.signature()
        known = self.known.get(signature)
        if known is None:
            return self._first(operator, signature)
        plan, blocks = carry_out(known[0], operator)
        if plan is not known[0]:
            self.known[signature] = plan, None
        return blocks

    def _first(self, operator: JacobianOperator, signature: Hashable) -> Blocks:
        """The first call of a kind; one function, transformed anew each time, is planned once."""
        shared = shared_plans().of(operator.func, self) if self.memory is None else {}
        with alone():  # it is evaluated more than once, with the same random numbers
            plan, _ = shared.get(signature) or (self.plan(operator), None)
            plan, blocks = carry_out(plan, operator)
        self.known[signature] = plan, None
        if not is_bounded(plan):
            shared[signature] = plan, None
        return blocks

    def plan(self, operator: JacobianOperator) -> Plan:
        """What to do with this operator, which is evaluated."""
        costs = counted_costs(operator)
        if costs is None:
            return by_sizes(operator, self.directions)
        return bounded(fastest(costs, self.directions), costs, self.memory)

    def plan_samples(
        self, operator: JacobianOperator, samples: Sampled, run: Callable[[Swept, Chunk], Any]
    ) -> tuple[Plan, Chunk]:
        """What to do with each of a batch of samples, one of which this is; how many at once."""
        costs = counted_costs(operator)
        operator.repeat_draws()  # the samples draw as if none had been evaluated before
        directions = samples.ways(self.directions, self.by_layers)
        if costs is None:
            return by_sizes(operator, self.directions), None
        every = costs.times(samples.size, samples.are_copied)
        plan = spared(fastest(every, directions), every)
        return bounded_samples(plan, costs, samples.size, self.memory)


class SharedPlans:
    """Plans by function, for as long as it lives; by its fingerprint, where it is made anew."""

    def __init__(self) -> None:
        self._prints: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._plans: dict[Hashable, dict[Hashable, tuple[Plan, Chunk]]] = {}

    def of(self, call: Any, strategy: Hashable) -> dict[Hashable, tuple[Plan, Chunk]]:
        """By kind of call."""
        func = getattr(call, "func", call)
        try:
            found = self._prints.get(func)
            if found is None:
                found = self._prints.setdefault(func, fingerprint(func))
        except TypeError:  # neither hashed nor referred to weakly
            found = fingerprint(func)
        if len(self._plans) > MOST_FUNCTIONS:
            self._plans.clear()
        return self._plans.setdefault((found, strategy), {})


@cache
def shared_plans() -> SharedPlans:
    """Those of this process."""
    return SharedPlans()


def counted_costs(operator: JacobianOperator) -> Costs | None:
    """From a recorded evaluation; None where there is nothing to forecast from."""
    operator.repeat_draws()
    if is_pushing():  # torch has one level of forward mode: no machine can be measured inside it
        return None
    try:
        with uncompiled(), Recorder(operator.primals) as recorder:
            operator.outputs  # noqa: B018 (evaluates)
    except Unrecordable:
        operator.repeat_draws()
        return None
    return Costs.of(operator, recorder)


def carry_out(plan: Plan, operator: JacobianOperator) -> tuple[Plan, Blocks]:
    """Run a plan, or what it says to try otherwise; which it was, and what came out."""
    if is_heard():
        return attempt(plan, lambda plan: _told(plan, operator))
    return attempt(plan, lambda plan: plan.strategy.materialize(operator))


def _told(plan: Plan, operator: JacobianOperator) -> Blocks:
    """Run; say at INFO what ran, why, and how long it took beside the forecast."""
    start = time.perf_counter()
    blocks = plan.strategy.materialize(operator)
    took = in_seconds(time.perf_counter() - start)
    note("%s ran: %s; took %s", plan.strategy, plan.reason, took)
    return blocks
