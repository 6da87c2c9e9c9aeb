"""``strategy="auto"``: above the strategies that it picks from."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from jacfunc._chunks import Chunk
from jacfunc._costs import Costs
from jacfunc._operators import JacobianOperator
from jacfunc._plans import Direction, Plan, attempt, bounded, bounded_samples, by_sizes, fastest
from jacfunc._trail import is_heard, note
from jacfunc._types import Blocks
from jacfunc._words import in_seconds
from jacfunc._work import Recorder
from jacfunc.strategies import Forward, Reverse


@dataclass(frozen=True)
class Auto:
    """Chooses by forecast, once for each kind of call, and goes on where torch refuses.

    Args:
        directions: strategies to choose from; where one has no chunk size, that is chosen too.
        memory: bytes that the call may take, its result among them; None for half of what is
            free on the device.
    """

    directions: tuple[Direction, ...] = (Reverse(), Forward())
    memory: int | None = None
    known: dict[Hashable, tuple[Plan, Chunk]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first plan that torch carries out."""
        if torch.compiler.is_compiling():
            return by_sizes(operator, self.directions).materialize(operator)
        signature = operator.signature()
        plan, _ = self.known.get(signature) or (self.plan(operator), None)
        plan, blocks = attempt(plan, lambda plan: carry_out(plan, operator))
        self.known[signature] = plan, None
        return blocks

    def plan(self, operator: JacobianOperator) -> Plan:
        """What to do with this operator, which is evaluated."""
        costs = counted_costs(operator)
        if costs is None:
            return by_sizes(operator, self.directions)
        return bounded(fastest(costs, self.directions), costs, self.memory)

    def plan_samples(self, operator: JacobianOperator, batch: int) -> tuple[Plan, Chunk]:
        """What to do with each of a batch of samples, one of which this is; how many at once."""
        costs = counted_costs(operator)
        operator.repeat_draws()  # the samples draw as if none had been evaluated before
        if costs is None:
            return by_sizes(operator, self.directions), None
        plan = fastest(costs.times(batch), self.directions)
        return bounded_samples(plan, costs, batch, self.memory)


def counted_costs(operator: JacobianOperator) -> Costs | None:
    """From a recorded evaluation; None where there is nothing to forecast from."""
    operator.repeat_draws()
    with Recorder(operator.primals) as recorder:
        operator.outputs  # noqa: B018 (evaluates)
    return Costs.of(operator, recorder)


def carry_out(plan: Plan, operator: JacobianOperator) -> Blocks:
    """Run a plan; say at INFO what ran, why, and how long it took beside the forecast."""
    if isinstance(plan.strategy, Forward):
        operator.forget_graph()
    if not is_heard():
        return plan.strategy.materialize(operator)
    start = time.perf_counter()
    blocks = plan.strategy.materialize(operator)
    took = in_seconds(time.perf_counter() - start)
    note("%s ran: %s; took %s", plan.strategy, plan.reason, took)
    return blocks
