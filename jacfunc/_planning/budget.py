"""Plans that keep to the memory: in chunks, where one sweep might take too much."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from jacfunc._errors import Nameless
from jacfunc._forecasting import Costs
from jacfunc._memory import (
    CROWDED_BYTES,
    MODEST_BYTES,
    PIECE_BYTES,
    SPARE_BYTES,
    STAGED_BYTES,
    Chunk,
    FittedChunks,
    evenly,
    free_bytes,
)
from jacfunc._planning.choice import SampledWays
from jacfunc._planning.plan import Direction, Plan
from jacfunc._units import in_bytes
from jacfunc.strategies import Reverse, Strategy, Sweeping

BUDGET_SHARE = 0.5
"""Share of the free memory that is the budget, where the user gives none."""

HEAP_FACTOR = 6
"""The heap of a CPU takes up to so many times the bytes that a chunk counts: torch's tensors are
aligned, and a freed block is too small for the next one of its size.
"""

WORK_SHARE, PIECE_SHARE, LEAST_SAMPLES = 2, 6, 12
"""Without a budget a batch is evaluated in pieces where the work on a row of all takes more than
the first part of a large result. That on a row of a piece takes at most the second part; but a
piece has so many samples at least."""

MOST_TURNED = 10
"""Instead of many rows of a piece, one row is swept of at most so many times as many samples."""

ENOUGH_SEEDS, ENOUGH_BYTES = 128, 2**24
"""A chunk of more seeds that takes more bytes is no faster, and leaves the heap in pieces: then the
process takes two or three times the bytes that are counted.
"""


def bounded(plan: Plan, costs: Costs, memory: int | None) -> Plan:
    """The plan in chunks that keep to the budget, where one sweep might not.

    It has a second only where neither of the two needs chunks.
    """
    own, second = _in_chunks(plan, costs, memory), plan.second
    if second is None or (own is plan and _in_chunks(second, costs, memory) is second):
        return own
    return replace(own, second=None)


def with_room(plan: Plan, costs: Costs, memory: int | None) -> Plan:
    """The plan, which knows whether all rows at once would keep to the budget."""
    rows = Reverse()
    is_modest = not _is_scarce(rows, costs, memory)
    return replace(
        plan, fits_all_rows=is_modest or costs.most_bytes(rows) <= _budget(costs, memory)
    )


def _in_chunks(plan: Plan, costs: Costs, memory: int | None) -> Plan:
    strategy = plan.strategy
    if not _has_chunks(strategy):
        return plan
    if not _is_scarce(strategy, costs, memory):
        return plan
    budget = _budget(costs, memory)
    if costs.most_bytes(strategy) <= budget:
        return plan
    kept = costs.outputs if strategy.sweeps.are_pushes else costs.kept
    room = _room(budget, costs.result + kept, strict=memory is not None)
    most = max(ENOUGH_SEEDS, ENOUGH_BYTES // max(1, costs.seed_bytes(strategy)))
    chunk = FittedChunks(
        _counted(room, costs), strategy.chunk_size if isinstance(strategy.chunk_size, int) else most
    )
    reason = f"{plan.reason}; chunks within {in_bytes(budget)}"
    return replace(plan, strategy=replace(strategy, chunk_size=chunk), reason=reason)


def bounded_samples(plan: Plan, one: Costs, batch: int, memory: int | None) -> tuple[Plan, Chunk]:
    """The plan for each sample of a vmapped batch, and how many samples at once keep to the budget.

    ``one`` are the costs of a sample. It has a second only where neither of the two needs chunks.
    """
    own, second = _samples_in_chunks(plan, one, batch, memory), plan.second
    if second is None or (
        own == (plan, None) and _samples_in_chunks(second, one, batch, memory) == (second, None)
    ):
        return own
    return replace(own[0], second=None), own[1]


def _samples_in_chunks(
    plan: Plan, one: Costs, batch: int, memory: int | None
) -> tuple[Plan, Chunk]:
    strategy, batch_costs = plan.strategy, one.times(batch)
    if not _has_chunks(strategy) or not _is_scarce(strategy, batch_costs, memory):
        return plan, None
    budget = _budget(batch_costs, memory)
    if batch_costs.most_bytes(strategy) <= budget:
        return plan, None
    room = _room(budget, batch_costs.result, strict=memory is not None)
    plan = replace(plan, reason=f"{plan.reason}; samples within {in_bytes(budget)}")
    if one.most_bytes(strategy) <= room:
        return plan, FittedChunks(_counted(room, one))
    left = max(room - one.result - one.kept, 1)
    rows = replace(strategy, chunk_size=FittedChunks(_counted(left, one)))
    return replace(plan, strategy=rows), 1


def piece_of(samples: SampledWays, one: Costs, strategy: Sweeping) -> int | None:
    """How many samples of a batch that may be evaluated as a whole are taken at once; None for all.

    Where a row of all samples takes much beside the result, pieces of the batch are as fast: they
    stay in the cache. ``one`` are the costs of a sample, swept by this strategy.
    """
    work, result = one.seed_bytes(strategy), samples.size * one.result
    modest = MODEST_BYTES if result < STAGED_BYTES else min(result, MODEST_BYTES)
    if not samples.may_be_whole or samples.size * work <= max(modest, result // WORK_SHARE):
        return None
    most = min(PIECE_BYTES, max(1, result // PIECE_SHARE))
    return max(LEAST_SAMPLES, evenly(samples.size, work, most))


def fewer_rows(batch_costs: Costs) -> Reverse:
    """Reverse mode of all samples: few rows at once where a sweep of all rows needs new memory.

    Vector units are busy with the samples alone. Where the result is larger than what a sweep
    takes, all rows are swept at once, and it is written once.
    """
    crowd, has_heap = batch_costs.rows * batch_costs.widest, batch_costs.speeds.device.type == "cpu"
    if not has_heap or crowd <= max(CROWDED_BYTES, batch_costs.result):
        return Reverse()
    return Reverse(evenly(batch_costs.rows, batch_costs.widest, SPARE_BYTES))


def with_fewer_rows(plan: Plan, batch_costs: Costs) -> Plan:
    """The plan; with fewer rows at once, where it is reverse mode and all rows are too many."""
    fewer = fewer_rows(batch_costs)
    if plan.strategy != Reverse() or fewer == Reverse():
        return plan
    reason = f"{plan.reason}; {fewer.chunk_size} at once, whose memory is kept for the next"
    return replace(plan, strategy=fewer, reason=reason)


def in_pieces(plan: Plan, samples: SampledWays, one: Costs, piece: int) -> tuple[Plan, Chunk]:
    """The plan for pieces of so many samples, and how many samples are taken at once.

    Onto inputs one row at a time is swept, of more samples instead, as far as their graph is
    modest. A row of so many takes so long that vmap over rows spares nothing; but vmap takes
    normalizations apart, and convolutions and products of many samples are faster. Beside a large
    result it stays at few samples, as their graph would add to that.
    """
    plan = replace(plan, second=None)
    most = min(piece * min(one.rows, MOST_TURNED), MODEST_BYTES // max(1, one.kept))
    is_large = samples.size * one.result >= STAGED_BYTES
    if samples.has_layers or is_large or most <= piece:
        return plan, piece
    reason = f"{plan.reason}; one row of many samples at a time, instead of many rows of few"
    plan = replace(plan, strategy=Reverse(1), reason=reason)
    return plan, evenly(samples.size, 1, most) if most < samples.size else None


def is_bounded(plan: Plan) -> bool:
    """Do the plan's chunks keep to a budget?"""
    return isinstance(getattr(plan.strategy, "chunk_size", None), FittedChunks)


def _has_chunks(strategy: Strategy) -> TypeGuard[Direction]:
    """Does it sweep several seeds at once, so that it can sweep fewer?"""
    return isinstance(strategy, Sweeping) and strategy.sweeps.is_vmapped


def _is_scarce(strategy: Direction, costs: Costs, memory: int | None) -> bool:
    return memory is not None or costs.most_bytes(strategy) > MODEST_BYTES


def _budget(costs: Costs, memory: int | None) -> int:
    return memory if memory is not None else int(BUDGET_SHARE * free_bytes(costs.speeds.device))


def _counted(room: int, costs: Costs) -> int:
    """Bytes that a chunk may count, where the heap must not take more than ``room``."""
    return max(1, room // HEAP_FACTOR) if costs.speeds.device.type == "cpu" else room


def _room(budget: int, taken: int, strict: bool) -> int:
    """Bytes that the budget leaves for sweeps."""
    if strict and taken >= budget:
        raise Nameless(
            f"memory must hold the Jacobian and what is kept for it, {in_bytes(taken)}, "
            f"got {in_bytes(budget)}. Give more, or use products (jvp, vjp) instead."
        )
    return max(budget - taken, 1)
