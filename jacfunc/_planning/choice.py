"""Chooses the strategy with the least forecast time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from jacfunc._assembly import numel
from jacfunc._forecasting import Costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._planning.plan import Direction, Plan, alternatives, with_few_seeds
from jacfunc._units import in_seconds
from jacfunc.strategies import Looped, Reverse, ReverseOverForward, Strategy, Structured, Sweeping

CHUNKS = (512, 128)
RELUCTANCE = {"chunked": 1.4, "forward": 1.25, "layers": 1.5}
"""Factors on forecast times of strategies that are far slower where the forecast errs."""

FORWARD_FROM_RATIO = 4
"""By sizes alone: forward wins only where outputs far outnumber inputs."""


@dataclass(frozen=True)
class SampledWays:
    """A batch of samples, each of which has a Jacobian of its own.

    Args:
        size: the number of samples.
        has_layers: they are differentiated by parameters alone, which layers use.
        are_copied: their Jacobians are copied to another place, chunk by chunk.
        may_be_whole: are rows by layers, or onto inputs alone, those of a batch that is evaluated
            as a whole, and the same if that is done some samples at a time?
    """

    size: int
    has_layers: bool
    are_copied: bool
    may_be_whole: bool = False

    def ways(
        self, directions: tuple[Direction, ...], by_layers: Structured | None
    ) -> tuple[Direction, ...]:
        """The strategies to choose from."""
        return (*directions, by_layers) if self.has_layers and by_layers else directions

    def are_swept_whole(self, strategy: Strategy) -> bool:
        """Does it pull rows back through the graph of a batch that is evaluated as a whole?"""
        if not (self.may_be_whole and isinstance(strategy, Sweeping)):
            return False
        return not strategy.sweeps.are_pushes and strategy.sweeps.by_layers == self.has_layers


def by_sizes(operator: JacobianOperator, directions: Sequence[Direction]) -> Plan:
    """The plan where nothing can be forecast: by the numbers of inputs and outputs."""
    rows, columns = numel(operator.outputs), numel(operator.primals)
    are_many = rows > FORWARD_FROM_RATIO * columns
    pushing = [direction for direction in directions if direction.sweeps.are_pushes]
    pulling = [direction for direction in directions if not direction.sweeps.are_pushes]
    first, *others = [*pushing, *pulling] if are_many else [*pulling, *pushing]
    if torch.compiler.is_compiling():  # words for sizes that it leaves open would fix them
        return Plan(first, "by sizes alone", None, tuple(others))
    reason = f"by sizes alone: {rows} outputs, {columns} inputs"
    return Plan(first, reason, None, alternatives(first, directions, rows, columns))


def fastest(costs: Costs, directions: Sequence[Direction], most_loops: int = 1) -> Plan:
    """The plan with the least forecast seconds, weighted by the reluctance to risk far more."""
    possible = list(candidates(costs, directions, most_loops=most_loops))
    sizes = f"{costs.rows} outputs, {costs.columns} inputs"
    if len(possible) == 1:
        reason = f"{sizes}: nothing else comes into question"
        best = possible[0]
        return Plan(best, reason, None, alternatives(best, directions, costs.rows, costs.columns))
    seconds = {s: costs.seconds(s) for s in possible if not s.sweeps.are_pushes}
    if not seconds or min(seconds.values()) > costs.least_push():
        seconds |= {s: costs.seconds(s) for s in possible if s.sweeps.are_pushes}
    possible = list(seconds)
    best = min(possible, key=lambda s: seconds[s] * _reluctance(s, costs))
    rivals = [s for s in possible if type(s) is not type(best)]

    def plan_of(strategy: Sweeping) -> Plan:
        following = alternatives(strategy, directions, costs.rows, costs.columns)
        reason = f"{sizes}: forecast {in_seconds(seconds[strategy])}"
        return Plan(strategy, reason, seconds[strategy], following)

    plan = plan_of(best)
    if not rivals:
        return plan
    second = plan_of(min(rivals, key=seconds.__getitem__))
    told = f"{plan.reason}, {in_seconds(second.seconds)} by {type(second.strategy).__name__}"
    return replace(plan, reason=told, second=second)


def candidates(
    costs: Costs, directions: Sequence[Direction], reach: float = 1.0, most_loops: int = 1
) -> Iterator[Sweeping]:
    """Strategies that may be the fastest.

    Forward mode is one only where there are at most ``reach`` times as many inputs as outputs: with
    more it hardly ever wins. Loops are, for up to ``most_loops`` seeds: one seed needs no vmap.
    Reverse over forward mode took 1.3 to 5 times as long as reverse over reverse mode in all that
    was measured: it is left to where the others are refused.
    """
    for direction in directions:
        if isinstance(direction, ReverseOverForward) and len(directions) > 1:
            continue
        total = costs.seeds(direction)
        pushes, by_layers = direction.sweeps.are_pushes, direction.sweeps.by_layers
        if pushes and len(directions) > 1:
            if total > reach * costs.rows:
                continue
            direction = with_few_seeds(direction, costs.rows, costs.columns)
        if total > 1 or not pushes:
            yield direction
        if direction.chunk_size is None and not by_layers:
            sizes = dict.fromkeys((*CHUNKS, costs.most_seeds(direction)))
            yield from (replace(direction, chunk_size=size) for size in sizes if size < total)
        if pushes and total <= most_loops:
            yield Looped("columns")
        if not (pushes or by_layers) and 1 < total <= most_loops:
            yield Looped("rows")
        if direction == Reverse() and total == 1:
            return  # nothing beats a single pullback


def _reluctance(strategy: Sweeping, costs: Costs) -> float:
    sweeps = strategy.sweeps
    if sweeps.by_layers:
        # in low precision it is the products of the other strategies that take ten times as long
        is_low = costs.of_products is not None and costs.of_products is not costs.speeds
        return 1.0 if costs.reuses_pages or is_low else RELUCTANCE["layers"]
    is_chunked = sweeps.is_vmapped and sweeps.chunk_size is not None
    chunked = RELUCTANCE["chunked"] if is_chunked else 1.0
    return chunked * (RELUCTANCE["forward"] if sweeps.are_pushes else 1.0)
