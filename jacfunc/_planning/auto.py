"""``strategy="auto"``: above the strategies that it picks from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jacfunc._forecasting import Swept, counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._lock import alone
from jacfunc._memory import Chunk
from jacfunc._planning.budget import bounded, bounded_samples, spared
from jacfunc._planning.choice import SampledWays, by_sizes, fastest
from jacfunc._planning.plan import Direction, Plan, carry_out, rows_first
from jacfunc._planning.recall import Planner, recall, remember
from jacfunc._types import Blocks
from jacfunc.strategies import Forward, Reverse, Structured


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

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first plan that torch carries out."""
        return by_plan(self, operator, self.directions)

    def plan(self, operator: JacobianOperator) -> Plan:
        """What to do with this operator, which is evaluated."""
        costs = counted_costs(operator)
        if costs is None:
            return by_sizes(operator, self.directions)
        return bounded(fastest(costs, self.directions), costs, self.memory)

    def plan_samples(
        self, operator: JacobianOperator, samples: SampledWays, run: Callable[[Swept, Chunk], Any]
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


class Planning(Planner, Protocol):
    """A strategy that makes plans for operators."""

    def plan(self, operator: JacobianOperator) -> Plan: ...


def by_plan(
    strategy: Planning, operator: JacobianOperator, directions: Sequence[Direction]
) -> Blocks:
    """Blocks by the plan that is remembered for calls of this kind, or made now."""
    if torch.compiler.is_compiling():
        return by_sizes(operator, directions).materialize(operator)
    kind = operator.call_kind
    recalled = recall(strategy, kind)
    # a first call evaluates more than once, with the same random numbers
    with alone() if recalled is None else nullcontext():
        before = strategy.plan(operator) if recalled is None else recalled[0]
        plan, blocks = carry_out(before, operator)
    if recalled is None or plan is not before:
        remember(strategy, kind, (plan, None))
    return blocks
