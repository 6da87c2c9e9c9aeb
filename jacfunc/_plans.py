"""Strategies chosen: the fastest by forecast, in chunks that keep to the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jacfunc._assembly import numel
from jacfunc._errors import Refused
from jacfunc._forecasting import Costs, Forecast, Swept, is_forward
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import note
from jacfunc._types import Blocks
from jacfunc._units import in_seconds
from jacfunc.strategies import Forward, Looped, Reverse, Strategy, Structured

CHUNKS = (512, 128)
RELUCTANCE = {"chunked": 1.4, "forward": 1.25, "layers": 1.75}
"""Forecasts err: what is far slower when they do must promise so much to be taken."""

FORWARD_FROM_RATIO = 4
"""By sizes alone: forward wins only where outputs far outnumber inputs."""

MODEST = 2**26
"""Bytes that are taken without asking how many are free."""

NUMBER = 8
"""Bytes of one number of a seed, at most."""

Direction = Reverse | Forward | Structured
Result = TypeVar("Result")

UNMAPPED = 0
"""Samples at once, where no plan runs under vmap."""


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
        """The next plan, where there is one."""
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
            note("%s was refused: %s", plan.strategy, refusal)
            if not plan.otherwise:
                raise  # here: who raises an argument of its own is kept alive by it, in a cycle
            plan = plan.instead(refusal)


def by_sizes(operator: JacobianOperator, directions: Sequence[Direction]) -> Plan:
    """Where there is nothing to forecast from."""
    rows, columns = numel(operator.outputs), numel(operator.primals)
    wanted = Forward if rows > FORWARD_FROM_RATIO * columns else Reverse
    chosen = next((d for d in directions if isinstance(d, wanted)), directions[0])
    reason = f"by sizes alone: {rows} outputs, {columns} inputs"
    return Plan(chosen, reason, None, others(chosen, directions, rows, columns))


def fastest(costs: Costs, directions: Sequence[Direction]) -> Plan:
    """The least seconds by forecast, with some reluctance towards what could be far slower."""
    possible = list(candidates(costs, directions))
    sizes = f"{costs.rows} outputs, {costs.columns} inputs"
    if len(possible) == 1:
        reason = f"{sizes}: nothing else comes into question"
        best = possible[0]
        return Plan(best, reason, None, others(best, directions, costs.rows, costs.columns))
    seconds = {s: costs.seconds(s) for s in possible if not is_forward(s)}
    if not seconds or min(seconds.values()) > costs.least_push():
        seconds |= {s: costs.seconds(s) for s in possible if is_forward(s)}
    possible = list(seconds)
    best = min(possible, key=lambda s: seconds[s] * _reluctance(s, costs))
    rivals = [s for s in possible if type(s) is not type(best)]
    reason = f"{sizes}: forecast {in_seconds(seconds[best])}"
    if rivals:
        second = min(rivals, key=seconds.__getitem__)
        reason += f", {in_seconds(seconds[second])} by {second}"
    following = others(best, directions, costs.rows, costs.columns)
    return Plan(best, reason, seconds[best], following)


def others(
    chosen: Strategy, directions: Sequence[Direction], rows: int, columns: int
) -> tuple[Direction, ...]:
    """What is tried where the chosen strategy is refused, the cheaper ways first.

    Nobody has asked for these: the seeds of a chunk must not take more memory than the result.
    """
    left = [direction for direction in directions if type(direction) is not type(chosen)]
    # a refusal may come late, and whoever pushes more tangents than there are rows pays for it
    left.sort(key=lambda direction: is_forward(direction) and columns > rows)
    return tuple(_with_few_seeds(direction, rows, columns) for direction in left)


def _with_few_seeds(direction: Direction, rows: int, columns: int) -> Direction:
    """The strategy in chunks whose seeds take no more memory than the result, or little.

    A chunk that was given stays as it is.
    """
    if isinstance(direction, Structured) or direction.chunk_size is not None:
        return direction
    if is_forward(direction):
        return direction if columns <= rows else replace(direction, chunk_size=max(rows, 1))
    most = max(columns, MODEST // NUMBER // max(rows, 1), 1)
    return direction if rows <= most else replace(direction, chunk_size=most)


def rows_first(plan: Plan, one: JacobianOperator) -> Plan:
    """The plan for samples, of which this is one: they are looped before many tangents are pushed.

    With more columns than rows that is the cheaper way, and it needs no seed for each column.
    """
    if numel(one.primals) <= numel(one.outputs):
        return plan
    return replace(plan, otherwise=tuple(d for d in plan.otherwise if not is_forward(d)))


def candidates(
    costs: Costs, directions: Sequence[Direction], reach: float = 1.0, most_loops: int = 1
) -> Iterator[Swept]:
    """What may be fastest.

    Forward mode only up to ``reach`` times as many inputs as outputs: with more it hardly ever
    wins. Loops over up to ``most_loops`` seeds; a single one is swept without vmap.
    """
    for direction in directions:
        total = costs.seeds(direction)
        if is_forward(direction) and len(directions) > 1:
            if total > reach * costs.rows:
                continue
            direction = _with_few_seeds(direction, costs.rows, costs.columns)
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
