"""``strategy="auto"``: above the strategies that it picks from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from jacfunc._assembly import Sink
from jacfunc._calls import fingerprint
from jacfunc._forecasting import counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._lock import alone
from jacfunc._memory import Chunk, FittedChunks
from jacfunc._planning.budget import bounded, bounded_samples, is_bounded, spared
from jacfunc._planning.choice import SampledWays, by_sizes, fastest
from jacfunc._planning.plan import Direction, Plan, carry_out, rows_first
from jacfunc._remembered import MOST_KINDS, Recent, Remembered, nothing_yet
from jacfunc._types import Blocks
from jacfunc.strategies import Forward, Reverse, Streaming, Structured, Sweeping

MOST_FUNCTIONS = 1000
"""Whose plans are kept by their fingerprints."""

Planned = tuple[Plan, Chunk]
"""What to do, and with how many samples at once."""


@dataclass(frozen=True)
class Auto(Streaming):
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
    known: Remembered[Planned] = field(default_factory=nothing_yet, repr=False, compare=False)

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first plan that torch carries out."""
        return by_plan(self, sink, operator, self.directions)

    def recall(self, called: Any, kind: Hashable) -> Planned | None:
        """What was done before, by this strategy or by another one that is equal to it."""
        found = self.known.get(called, kind)
        if found is None and self.memory is None:
            found = shared_plans().get(called, (self, kind))
            if found is not None:
                self.known.put(called, kind, found)
        return found

    def remember(self, called: Any, kind: Hashable, planned: Planned) -> None:
        """For later calls; for those of other transforms where it was not this one's budget."""
        self.known.put(called, kind, planned)
        plan, chunk = planned
        if self.memory is None and not is_bounded(plan) and not isinstance(chunk, FittedChunks):
            shared_plans().put(called, (self, kind), planned)

    def plan(self, operator: JacobianOperator) -> Plan:
        """What to do with this operator, which is evaluated."""
        costs = counted_costs(operator)
        if costs is None:
            return by_sizes(operator, self.directions)
        return bounded(fastest(costs, self.directions), costs, self.memory)

    def plan_samples(
        self,
        operator: JacobianOperator,
        samples: SampledWays,
        run: Callable[[Sweeping, Chunk], Any],
    ) -> tuple[Plan, Chunk]:
        """What to do with each of a batch of samples, one of which this is; how many at once."""
        costs = counted_costs(operator)
        operator.repeat_draws()  # the samples draw as if none had been evaluated before
        directions = samples.ways(self.directions, self.by_layers)
        if costs is None:
            return rows_first(by_sizes(operator, self.directions), operator), None
        every = costs.times(samples.size, samples.are_copied)
        plan = rows_first(spared(fastest(every, directions), every), operator)
        return bounded_samples(plan, costs, samples.size, self.memory)


class Planning(Protocol):
    """What makes plans, and remembers them by what is called and the kind of call."""

    def recall(self, called: Any, kind: Hashable) -> Planned | None: ...

    def remember(self, called: Any, kind: Hashable, planned: Planned) -> None: ...

    def plan(self, operator: JacobianOperator) -> Plan: ...


def by_plan(
    strategy: Planning, sink: Sink, operator: JacobianOperator, directions: Sequence[Direction]
) -> Blocks:
    """Blocks by the plan that is remembered for calls of this kind, or made now."""
    if torch.compiler.is_compiling():
        return by_sizes(operator, directions).into(sink, operator)
    called, signature = operator.called, operator.signature()
    known = strategy.recall(called, signature)
    # a first call evaluates more than once, with the same random numbers
    with alone() if known is None else nullcontext():
        before = strategy.plan(operator) if known is None else known[0]
        plan, blocks = carry_out(before, sink, operator)
    if known is None or plan is not before:
        strategy.remember(called, signature, (plan, None))
    return blocks


class SharedPlans:
    """Plans of all transforms, by what is called and the kind of call.

    A function may be made anew at every call: those with one fingerprint have one plan. A module
    may do anything with what it keeps: another one is planned anew.
    """

    def __init__(self) -> None:
        self._plans: Remembered[Planned] = Remembered()
        self._prints: Remembered[str] = Remembered()
        self._by_print: Recent[Recent[Planned]] = Recent(MOST_FUNCTIONS)

    def get(self, called: Any, kind: Hashable) -> Planned | None:
        """The plan, if there is one."""
        found = self._plans.get(called, kind)
        if found is None and not isinstance(called, nn.Module):
            kinds = self._by_print.get(self._print(called))
            found = None if kinds is None else kinds.get(kind)
        return found

    def put(self, called: Any, kind: Hashable, planned: Planned) -> None:
        """Keep a plan."""
        self._plans.put(called, kind, planned)
        if isinstance(called, nn.Module):
            return
        found = self._print(called)
        kinds = self._by_print.get(found)
        if kinds is None:
            kinds = Recent(MOST_KINDS)
            self._by_print.put(found, kinds)
        kinds.put(kind, planned)

    def _print(self, func: Any) -> str:
        found = self._prints.get(func, None)
        if found is None:
            found = fingerprint(func)
            self._prints.put(func, None, found)
        return found


@cache
def shared_plans() -> SharedPlans:
    """Those of this process."""
    return SharedPlans()
