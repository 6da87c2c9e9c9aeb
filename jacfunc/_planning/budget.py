"""Plans that keep to the memory: in chunks, where one sweep might take too much."""

from __future__ import annotations

from dataclasses import replace

from jacfunc._forecasting import Costs
from jacfunc._memory import Chunk, FittedChunks, evenly, free_bytes
from jacfunc._planning.plan import MODEST, Direction, Plan
from jacfunc._units import in_bytes
from jacfunc.strategies import Forward, Reverse

SHARE = 0.5
"""Share of the free memory that is the budget, where the user gives none."""

CROWDED, SPARE = 2**24, 2**23
"""Bytes of all rows of all samples at one operation, from which on a heap does not keep what a
sweep leaves; and those that it is given then.
"""


def bounded(plan: Plan, costs: Costs, memory: int | None) -> Plan:
    """The plan in chunks that keep to the budget, where one sweep might not."""
    strategy = plan.strategy
    if not isinstance(strategy, Reverse | Forward) or not _is_scarce(strategy, costs, memory):
        return plan
    budget = _budget(costs, memory)
    if costs.most_bytes(strategy) <= budget:
        return plan
    kept = costs.kept if isinstance(strategy, Reverse) else costs.outputs
    room = _room(budget, costs.result + kept, strict=memory is not None)
    chunk = FittedChunks(
        room, strategy.chunk_size if isinstance(strategy.chunk_size, int) else None
    )
    reason = f"{plan.reason}; chunks within {in_bytes(budget)}"
    return replace(plan, strategy=replace(strategy, chunk_size=chunk), reason=reason)


def bounded_samples(plan: Plan, one: Costs, batch: int, memory: int | None) -> tuple[Plan, Chunk]:
    """The plan for each sample of a vmapped batch, and how many samples at once keep to the budget.

    ``one`` are the costs of a sample.
    """
    strategy, every = plan.strategy, one.times(batch)
    if not isinstance(strategy, Direction) or not _is_scarce(strategy, every, memory):
        return plan, None
    budget = _budget(every, memory)
    if every.most_bytes(strategy) <= budget:
        return plan, None
    room = _room(budget, every.result, strict=memory is not None)
    plan = replace(plan, reason=f"{plan.reason}; samples within {in_bytes(budget)}")
    if one.most_bytes(strategy) <= room:
        return plan, FittedChunks(room)
    rows = replace(strategy, chunk_size=FittedChunks(max(room - one.result - one.kept, 1)))
    return replace(plan, strategy=rows), 1


def fewer_rows(every: Costs) -> Reverse:
    """Reverse mode of all samples: few rows at once where a sweep of all rows needs new memory.

    Vector units are busy with the samples alone. Where the result is larger than what a sweep
    takes, all rows are swept at once, and it is written once.
    """
    crowd, has_heap = every.rows * every.widest, every.speeds.device.type == "cpu"
    if not has_heap or crowd <= max(CROWDED, every.result):
        return Reverse()
    return Reverse(evenly(every.rows, every.widest, SPARE))


def spared(plan: Plan, every: Costs) -> Plan:
    """The plan; with fewer rows at once, where it is reverse mode and all rows are too many."""
    fewer = fewer_rows(every)
    if plan.strategy != Reverse() or fewer == Reverse():
        return plan
    reason = f"{plan.reason}; {fewer.chunk_size} at once, whose memory is kept for the next"
    return replace(plan, strategy=fewer, reason=reason)


def is_bounded(plan: Plan) -> bool:
    """Do the plan's chunks keep to a budget?"""
    return isinstance(getattr(plan.strategy, "chunk_size", None), FittedChunks)


def _is_scarce(strategy: Direction, costs: Costs, memory: int | None) -> bool:
    return memory is not None or costs.most_bytes(strategy) > MODEST


def _budget(costs: Costs, memory: int | None) -> int:
    return memory if memory is not None else int(SHARE * free_bytes(costs.speeds.device))


def _room(budget: int, taken: int, strict: bool) -> int:
    """Bytes that the budget leaves for sweeps."""
    if strict and taken >= budget:
        raise ValueError(
            f"memory: it must hold the Jacobian and what is kept for it, {in_bytes(taken)}, "
            f"got {in_bytes(budget)}. Give more, or use products (jvp, vjp) instead."
        )
    return max(budget - taken, 1)
