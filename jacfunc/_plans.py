"""Strategies chosen: the fastest by forecast, in chunks that keep to the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jacfunc._basis import numel
from jacfunc._check import Refused
from jacfunc._chunks import Chunk, Within, evenly
from jacfunc._costs import Costs, is_forward
from jacfunc._forecast import Forecast, Swept
from jacfunc._machine import free_bytes
from jacfunc._operators import JacobianOperator
from jacfunc._trail import note
from jacfunc._types import Blocks
from jacfunc._words import in_bytes, in_seconds
from jacfunc.strategies import Forward, Looped, Reverse, Strategy, Structured

CHUNKS = (512, 128)
RELUCTANCE = {"chunked": 1.4, "forward": 1.25, "layers": 1.75}
"""Forecasts err: what is far slower when they do must promise so much to be taken."""

FORWARD_FROM_RATIO = 4
"""By sizes alone: forward wins only where outputs far outnumber inputs."""

MODEST = 2**26
"""Bytes that are taken without asking how many are free."""

SHARE = 0.5
"""Of the free memory: the budget where none is given."""

CROWDED, SPARE = 2**24, 2**23
"""Bytes of all rows of all samples at one operation, from which on a heap does not keep what a
sweep leaves; and those that it is given then.
"""

Direction = Reverse | Forward | Structured
Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
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

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the strategy, or by the next that is not refused."""
        return attempt(self, lambda plan: plan.strategy.materialize(operator))[1]

    def instead(self, refusal: Refused) -> Plan:
        """The next plan; the refusal, where there is none."""
        note("%s was refused: %s", self.strategy, refusal)
        if not self.otherwise:
            raise refusal
        reason = f"{type(self.strategy).__name__} was refused: {refusal}"
        return Plan(self.otherwise[0], reason, None, self.otherwise[1:])


@dataclass(frozen=True)
class Sampled:
    """A batch whose samples are differentiated each on its own.

    Args:
        size: how many there are.
        has_layers: by parameters alone, which layers are made of.
        are_copied: their Jacobians are put together elsewhere.
    """

    size: int
    has_layers: bool
    are_copied: bool

    def ways(
        self, directions: tuple[Direction, ...], by_layers: Structured | None
    ) -> tuple[Direction, ...]:
        """What there is to choose from."""
        return (*directions, by_layers) if self.has_layers and by_layers else directions


def attempt(plan: Plan, run: Callable[[Plan], Result]) -> tuple[Plan, Result]:
    """Run a plan, or what it says to try otherwise; which it was, and what came out."""
    while True:
        try:
            return plan, run(plan)
        except Refused as refusal:
            plan = plan.instead(refusal)


def by_sizes(operator: JacobianOperator, directions: Sequence[Direction]) -> Plan:
    """Where there is nothing to forecast from."""
    rows, columns = numel(operator.outputs), numel(operator.primals)
    wanted = Forward if rows > FORWARD_FROM_RATIO * columns else Reverse
    chosen = next((d for d in directions if isinstance(d, wanted)), directions[0])
    reason = f"by sizes alone: {rows} outputs, {columns} inputs"
    return Plan(chosen, reason, None, _others(chosen, directions))


def fastest(costs: Costs, directions: Sequence[Direction]) -> Plan:
    """The least seconds by forecast, with some reluctance towards what could be far slower."""
    possible = list(candidates(costs, directions))
    sizes = f"{costs.rows} outputs, {costs.columns} inputs"
    if len(possible) == 1:
        reason = f"{sizes}: nothing else comes into question"
        return Plan(possible[0], reason, None, _others(possible[0], directions))
    seconds = {s: costs.seconds(s) for s in possible if not is_forward(s)}
    if not seconds or min(seconds.values()) > costs.least_push():
        seconds |= {s: costs.seconds(s) for s in possible if is_forward(s)}
    possible = list(seconds)
    best = min(possible, key=lambda s: seconds[s] * _reluctance(s, costs))
    others = [s for s in possible if type(s) is not type(best)]
    reason = f"{sizes}: forecast {in_seconds(seconds[best])}"
    if others:
        second = min(others, key=seconds.__getitem__)
        reason += f", {in_seconds(seconds[second])} by {second}"
    return Plan(best, reason, seconds[best], _others(best, directions))


def _others(chosen: Strategy, directions: Sequence[Direction]) -> tuple[Direction, ...]:
    return tuple(direction for direction in directions if type(direction) is not type(chosen))


def candidates(
    costs: Costs, directions: Sequence[Direction], reach: float = 1.0, most_loops: int = 1
) -> Iterator[Swept]:
    """What may be fastest.

    Forward mode only up to ``reach`` times as many inputs as outputs: with more it hardly ever
    wins. Loops over up to ``most_loops`` seeds; a single one is swept without vmap.
    """
    for direction in directions:
        total = costs.seeds(direction)
        if is_forward(direction) and len(directions) > 1 and total > reach * costs.rows:
            continue
        if total > 1 or not is_forward(direction):
            yield direction
        if direction.chunk_size is None and not isinstance(direction, Structured):
            yield from (replace(direction, chunk_size=size) for size in CHUNKS if size < total)
        if is_forward(direction) and total <= most_loops:
            yield Looped("columns")
        if isinstance(direction, Reverse) and 1 < total <= most_loops:
            yield Looped("rows")
        if direction == Reverse() and total == 1:
            return  # nothing beats a single pullback


def _reluctance(strategy: Swept, costs: Costs) -> float:
    if isinstance(strategy, Structured):
        return 1.0 if costs.reuses_pages else RELUCTANCE["layers"]
    chunked = RELUCTANCE["chunked"] if getattr(strategy, "chunk_size", None) else 1.0
    return chunked * (RELUCTANCE["forward"] if is_forward(strategy) else 1.0)


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
    chunk = Within(room, strategy.chunk_size if isinstance(strategy.chunk_size, int) else None)
    reason = f"{plan.reason}; chunks within {in_bytes(budget)}"
    return replace(plan, strategy=replace(strategy, chunk_size=chunk), reason=reason)


def bounded_samples(plan: Plan, one: Costs, batch: int, memory: int | None) -> tuple[Plan, Chunk]:
    """The same for a call that is vmapped over a batch: what each sample does, how many at once."""
    strategy, every = plan.strategy, one.times(batch)
    if not isinstance(strategy, Direction) or not _is_scarce(strategy, every, memory):
        return plan, None
    budget = _budget(every, memory)
    if every.most_bytes(strategy) <= budget:
        return plan, None
    room = _room(budget, every.result, strict=memory is not None)
    plan = replace(plan, reason=f"{plan.reason}; samples within {in_bytes(budget)}")
    if one.most_bytes(strategy) <= room:
        return plan, Within(room)
    rows = replace(strategy, chunk_size=Within(max(room - one.result - one.kept, 1)))
    return replace(plan, strategy=rows), 1


def fewer_rows(every: Costs) -> Reverse:
    """Reverse mode of all samples, a few rows at once where each sweep of all would get new memory.

    Samples fill a vector without that; where the result is the larger part, it stays one write.
    """
    crowd, has_heap = every.rows * every.widest, every.speeds.device.type == "cpu"
    if not has_heap or crowd <= max(CROWDED, every.result):
        return Reverse()
    return Reverse(evenly(every.rows, every.widest, SPARE))


def spared(plan: Plan, every: Costs) -> Plan:
    """The plan with fewer rows at once, where it is reverse mode of all and that is too much."""
    fewer = fewer_rows(every)
    if plan.strategy != Reverse() or fewer == Reverse():
        return plan
    reason = f"{plan.reason}; {fewer.chunk_size} at once, whose memory is kept for the next"
    return replace(plan, strategy=fewer, reason=reason)


def is_bounded(plan: Plan) -> bool:
    """Does its chunk follow a budget, which is this call's alone?"""
    return isinstance(getattr(plan.strategy, "chunk_size", None), Within)


def _is_scarce(strategy: Direction, costs: Costs, memory: int | None) -> bool:
    return memory is not None or costs.most_bytes(strategy) > MODEST


def _budget(costs: Costs, memory: int | None) -> int:
    return memory if memory is not None else int(SHARE * free_bytes(costs.speeds.device))


def _room(budget: int, taken: int, strict: bool) -> int:
    """What is left for the sweeps."""
    if strict and taken >= budget:
        raise ValueError(
            f"memory: it must hold the Jacobian and what is kept for it, {in_bytes(taken)}, "
            f"got {in_bytes(budget)}. Give more, or use products (jvp, vjp) instead."
        )
    return max(budget - taken, 1)
