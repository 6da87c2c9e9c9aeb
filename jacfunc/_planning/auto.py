"""``strategy="auto"``: the strategy with the least forecast time, planned once a kind of call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jacfunc._assembly import Sink
from jacfunc._errors import Refused
from jacfunc._forecasting import counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._memory import Chunk
from jacfunc._planning.budget import (
    bounded,
    bounded_samples,
    in_pieces,
    piece_of,
    with_fewer_rows,
    with_room,
)
from jacfunc._planning.choice import SampledWays, by_sizes, fastest
from jacfunc._planning.plan import Direction, Plan, blocks_by, rows_first
from jacfunc._planning.recall import Planner, by_memory, recall, settled_by_plan
from jacfunc._remembered import CallKind
from jacfunc._types import Blocks
from jacfunc.strategies import (
    Forward,
    Reverse,
    ReverseOverForward,
    Strategy,
    Streaming,
    Structured,
    Sweeping,
)


@dataclass(frozen=True)
class Auto(Streaming):
    """Runs the strategy with the least forecast time; the next one where torch refuses it.

    It plans once for each kind of call.

    Args:
        directions: strategies to choose from; where one has no chunk size, that is chosen too.
        memory: bytes that the call may take, its result among them; None for half of what is
            free on the device.
        by_layers: a further choice where samples are differentiated by parameters.
    """

    directions: tuple[Direction, ...] = (Reverse(), Forward())
    memory: int | None = None
    by_layers: Structured | None = None

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first strategy that torch does not refuse."""
        return by_plan(self, sink, operator, self.directions)

    def settled_for(self, kind: CallKind) -> Strategy | None:
        """The plan's strategy, once the plan stays."""
        return settled_by_plan(self, kind)

    def all_rows_within(self, kind: CallKind) -> float | None:
        """Seconds of the plan, where all rows would keep to the memory; without a budget alone."""
        if self.memory is not None or (planned := recall(self, kind)) is None:
            return None
        plan, _ = planned
        return plan.timing.seconds if plan.fits_all_rows else None

    def plan(self, operator: JacobianOperator) -> Plan:
        """The plan for this operator, which is evaluated for it."""
        try:
            costs = counted_costs(operator)
        except Refused as refusal:
            if not isinstance(self.directions[-1], ReverseOverForward):
                raise
            first, *others = self.directions
            return Plan(first, f"nothing could be forecast: {refusal}", None, tuple(others))
        if costs is None:
            return by_sizes(operator, self.directions)
        plan = bounded(fastest(costs, self.directions, costs.most_loops), costs, self.memory)
        return with_room(plan, costs, self.memory)

    def plan_samples(
        self,
        operator: JacobianOperator,
        samples: SampledWays,
        run: Callable[[Sweeping, Chunk], Any],
    ) -> tuple[Plan, Chunk]:
        """The plan for each sample of a batch, and how many samples to take at once.

        ``operator`` is the one of a single sample.
        """
        costs = counted_costs(operator)
        operator.rewind_generators()  # the samples draw as if none had been evaluated before
        directions = samples.ways(self.directions, self.by_layers)
        if costs is None:
            return rows_first(by_sizes(operator, self.directions), operator), None
        batch_costs = costs.times(samples.size, samples.are_copied)
        whole = self.by_layers if samples.has_layers and self.by_layers else Reverse()
        piece = None if self.memory is not None else piece_of(samples, costs, whole)
        swept = costs.times(piece, samples.are_copied) if piece else batch_costs
        plan = fastest(batch_costs, directions).changed(
            lambda plan: rows_first(with_fewer_rows(plan, swept), operator)
        )
        plan, chunk = bounded_samples(plan, costs, samples.size, self.memory)
        if piece and chunk != 1 and samples.are_swept_whole(plan.strategy):
            return in_pieces(plan, samples, costs, piece)
        return plan, chunk


def by_plan(
    strategy: Planner, sink: Sink, operator: JacobianOperator, directions: Sequence[Direction]
) -> Blocks:
    """Blocks ``[*out_i, *in_j]`` by the plan of an earlier call of this kind, or by a new one."""
    if torch.compiler.is_compiling():
        return by_sizes(operator, directions).into(sink, operator)
    return by_memory(
        strategy,
        operator.call_kind,
        lambda: (strategy.plan(operator), None),
        lambda plan, _: blocks_by(plan, sink, operator),
    )


def pulls_all_rows(strategy: Strategy, kind: CallKind) -> bool:
    """Are rows of such calls pulled back all at once, by this strategy or by a plan that stays?"""
    chosen = strategy.settled_for(kind) if isinstance(strategy, Auto) else strategy
    return isinstance(chosen, Reverse) and chosen.chunk_size is None
