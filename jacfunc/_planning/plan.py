"""Strategies chosen: the fastest by forecast, in chunks that keep to the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jacfunc._assembly import Sink, numel
from jacfunc._errors import Refused
from jacfunc._forecasting import Forecast
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import is_heard, note
from jacfunc._memory import MODEST_BYTES
from jacfunc._types import Blocks
from jacfunc._units import in_seconds
from jacfunc.strategies import Forward, Reverse, Strategy, Streaming, Structured, blocks_into

NUMBER = 8
"""Bytes of one number of a seed, at most."""

Direction = Reverse | Forward | Structured
Result = TypeVar("Result")

UNMAPPED = 0
"""Samples at once, where no plan runs under vmap."""


@dataclass(frozen=True)
class Plan(Streaming):
    """A strategy that was chosen; itself a strategy, so that it can be used again.

    Args:
        strategy: what runs.
        reason: why, in words.
        seconds: what it was forecast to take on this machine; None where nothing was forecast.
        otherwise: what to try next, in order, where torch refuses.
        forecast: calls, FLOPs and bytes, where they were asked for.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.ones(20_000, 1)
        >>> plan = jacfunc.plan(lambda x: torch.sin(A @ x), torch.zeros(1), memory="1 MiB")
        >>> plan.forecast.result_bytes
        80000
        >>> jacfunc.jacobian(lambda x: torch.sin(A @ x), strategy=plan)(torch.zeros(1)).shape
        torch.Size([20000, 1])
    """

    strategy: Strategy
    reason: str
    seconds: float | None = None
    otherwise: tuple[Direction, ...] = ()
    forecast: Forecast | None = None

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the strategy, or by the next that is not refused."""
        return attempt(self, lambda plan: blocks_into(sink, plan.strategy, operator))[1]

    def instead(self, refusal: Refused) -> Plan:
        """The next plan, where there is one."""
        reason = f"{type(self.strategy).__name__} was refused: {refusal}"
        return Plan(self.otherwise[0], reason, None, self.otherwise[1:])


def attempt(plan: Plan, run: Callable[[Plan], Result]) -> tuple[Plan, Result]:
    """Run a plan, or what it says to try otherwise; which it was, and what came out."""
    while True:
        try:
            return plan, run(plan)
        except Refused as refusal:
            note("%s was refused: %s", plan.strategy, refusal)
            if not plan.otherwise:
                raise  # here: who raises an argument of its own is kept alive by it, in a cycle
            plan = plan.instead(refusal)


def others(
    chosen: Strategy, directions: Sequence[Direction], rows: int, columns: int
) -> tuple[Direction, ...]:
    """What is tried where the chosen strategy is refused, the cheaper ways first.

    Nobody has asked for these: the seeds of a chunk must not take more memory than the result.
    """
    left = [direction for direction in directions if type(direction) is not type(chosen)]
    # a refusal may come late, and whoever pushes more tangents than there are rows pays for it
    left.sort(key=lambda direction: direction.sweeps.are_pushes and columns > rows)
    return tuple(with_few_seeds(direction, rows, columns) for direction in left)


def with_few_seeds(direction: Direction, rows: int, columns: int) -> Direction:
    """The strategy in chunks whose seeds take no more memory than the result, or little.

    A chunk that was given stays as it is.
    """
    sweeps = direction.sweeps
    if sweeps.by_layers or sweeps.chunk_size is not None:
        return direction
    if sweeps.are_pushes:
        return direction if columns <= rows else replace(direction, chunk_size=max(rows, 1))
    most = max(columns, MODEST_BYTES // NUMBER // max(rows, 1), 1)
    return direction if rows <= most else replace(direction, chunk_size=most)


def rows_first(plan: Plan, one: JacobianOperator) -> Plan:
    """The plan for samples, of which this is one: they are looped before many tangents are pushed.

    With more columns than rows that is the cheaper way, and it needs no seed for each column.
    """
    if numel(one.primals) <= numel(one.outputs):
        return plan
    return replace(plan, otherwise=tuple(d for d in plan.otherwise if not d.sweeps.are_pushes))


def carry_out(plan: Plan, sink: Sink, operator: JacobianOperator) -> tuple[Plan, Blocks]:
    """Run a plan, or what it says to try otherwise; which it was, and what came out."""
    if is_heard():
        return attempt(plan, lambda plan: _told(plan, sink, operator))
    return attempt(plan, lambda plan: blocks_into(sink, plan.strategy, operator))


def _told(plan: Plan, sink: Sink, operator: JacobianOperator) -> Blocks:
    """Run; say at INFO what ran, why, and how long it took beside the forecast."""
    start = time.perf_counter()
    blocks = blocks_into(sink, plan.strategy, operator)
    took = in_seconds(time.perf_counter() - start)
    note("%s ran: %s; took %s", plan.strategy, plan.reason, took)
    return blocks
