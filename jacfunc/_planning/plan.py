"""A plan: the chosen strategy, the reason, and the strategies to try where torch refuses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple, Protocol, TypeVar

from jacfunc._assembly import Sink, numel
from jacfunc._errors import Refused
from jacfunc._forecasting import Compilation, Forecast, price_in_words
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import is_heard, note
from jacfunc._memory import MODEST_BYTES, Chunk
from jacfunc._showing import html_table
from jacfunc._types import Blocks
from jacfunc._units import in_bytes, in_counts, in_digits, in_seconds
from jacfunc.strategies import (
    Forward,
    Reverse,
    ReverseOverForward,
    Strategy,
    Streaming,
    Structured,
    blocks_into,
)

NUMBER = 8
"""Bytes of one number of a seed, at most."""

Direction = Reverse | Forward | Structured | ReverseOverForward
ResultT = TypeVar("ResultT")

UNMAPPED = 0
"""In place of a number of samples at once: no plan runs under vmap, samples go one by one."""

TIMED_RUNS = 2
"""Runs of a plan that are timed, after the first, in which torch sets things up."""


class Timing(NamedTuple):
    """How long a plan took.

    Args:
        seconds: of its fastest run that was timed.
        left: how many runs are still to be timed.
        before: the plan that took longer than forecast, instead of which this one is tried; with
            the number of samples at once.
    """

    seconds: float = inf
    left: int = TIMED_RUNS
    before: tuple[Plan, Chunk] | None = None


def check_strategy(api: str, strategy: object) -> None:
    """Refuse what is no strategy; a class is none, though it has the method."""
    is_object = not isinstance(strategy, type) and isinstance(strategy, Strategy)
    if not is_object or not callable(getattr(strategy, "materialize", None)):
        raise TypeError(
            f"{api}: strategy must be a name or an object with materialize(operator), "
            f"got {strategy!r}. Try Reverse(), Forward() or Looped()."
        )


class CompiledDerivative(Protocol):
    """A derivative that was compiled."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the derivative returns."""

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What each kind of call has cost, the latest kind first."""


class DerivativeCompiler(Protocol):
    """Compiles derivatives by a backend."""

    @property
    def backend(self) -> str:
        """The name of the backend."""

    def __call__(self, derivative: Callable[..., Any], /) -> CompiledDerivative:
        """The derivative, compiled."""


@dataclass(frozen=True, repr=False)
class Plan(Streaming):
    """A chosen strategy, with the reason; it is a strategy itself, so that it can be used again.

    It prints as a few lines, in a notebook as a table. ``jacfunc.compile(plan)`` is a plan whose
    derivatives are compiled.

    Args:
        strategy: what runs.
        reason: why, in words.
        seconds: what it was forecast to take on this machine; None where nothing was forecast.
        otherwise: what to try next, in order, where torch refuses.
        forecast: calls, FLOPs and bytes, where they were asked for.
        second: the plan of another kind that has the next best forecast.
        timing: how long it took in the calls for which it was remembered.
        compiler: what compiles the derivative for which the plan is used; None if nothing does.
        fits_all_rows: would all rows at once keep to the memory, too?

    Raises:
        TypeError: for a strategy that is none.

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
    second: Plan | None = field(default=None, repr=False, compare=False)
    timing: Timing = field(default=Timing(), repr=False, compare=False)
    compiler: DerivativeCompiler | None = None
    fits_all_rows: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.otherwise, tuple):
            raise TypeError(
                f"Plan: otherwise must be a tuple of strategies, got {self.otherwise!r}. "
                "Write (Forward(),) for the only one."
            )
        for strategy in (self.strategy, *self.otherwise):
            check_strategy("Plan", strategy)

    def __repr__(self) -> str:
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(["Plan:", *(f"  {name.ljust(width)}  {said}" for name, said in rows)])

    def _repr_html_(self) -> str:
        """The lines as a table in HTML, for notebooks."""
        return html_table("Plan", (), self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "strategy", str(self.strategy)
        yield "reason", self.reason
        if self.otherwise:
            yield "if refused", ", then ".join(map(str, self.otherwise))
        if (cost := self.forecast) is not None:
            yield "calls", f"{in_digits(cost.evaluations)}, with {in_digits(cost.sweeps)} sweeps"
            yield "FLOPs", in_counts(cost.flops)
            yield "result", in_bytes(cost.result_bytes)
            yield "peak", in_bytes(cost.peak_bytes)
        if self.seconds is not None:
            yield "time", in_seconds(self.seconds)
        if self.compiler is not None:
            yield "compiled", f"by {self.compiler.backend!r}"
        price = cost.compilation if cost is not None else None
        if price is not None and (not self.compiler or self.compiler.backend == price.backend):
            call, build, calls = price_in_words(price)
            yield "a compiled call", f"{call}, {build} before the first"
            yield "repaid after", calls

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the first strategy that torch does not refuse."""
        return attempt(self, lambda plan: blocks_into(sink, plan.strategy, operator))[1]

    def changed(self, change: Callable[[Plan], Plan]) -> Plan:
        """The plan after a change, which is made to its second, too."""
        plan = change(self)
        return plan if self.second is None else replace(plan, second=change(self.second))

    def instead(self, refusal: Refused) -> Plan:
        """The plan to try after a refusal."""
        reason = f"{type(self.strategy).__name__} was refused: {refusal}"
        return Plan(self.otherwise[0], reason, None, self.otherwise[1:])


def attempt(plan: Plan, run: Callable[[Plan], ResultT]) -> tuple[Plan, ResultT]:
    """The plan that ran and its result: of those to try, the first that torch does not refuse.

    Raises:
        Refused: if all are refused, with the reason of the first.
    """
    reason = None
    while True:
        try:
            return plan, run(plan)
        except Refused as refusal:
            note("%s was refused: %s", plan.strategy, refusal)
            if not plan.otherwise:
                if reason is None:
                    raise  # not in a function that gets the refusal: its traceback would be a cycle
                raise Refused(reason) from None
            reason, plan = reason or str(refusal), plan.instead(refusal)


def alternatives(
    chosen: Strategy, directions: Sequence[Direction], rows: int, columns: int
) -> tuple[Direction, ...]:
    """The strategies to try where torch refuses the chosen one, the cheaper ones first.

    The user has not asked for these, so a chunk of seeds must not take more memory than the result.
    """
    left = [direction for direction in directions if type(direction) is not type(chosen)]
    # a refusal may come late, after more tangents have been pushed than there are rows
    left.sort(key=lambda direction: direction.sweeps.are_pushes and columns > rows)
    return tuple(with_few_seeds(direction, rows, columns) for direction in left)


def with_few_seeds(direction: Direction, rows: int, columns: int) -> Direction:
    """The strategy in chunks whose seeds take no more memory than the result, or little.

    A chunk size that the user chose is not changed.
    """
    sweeps = direction.sweeps
    if sweeps.by_layers or sweeps.chunk_size is not None:
        return direction
    if sweeps.are_pushes:
        return direction if columns <= rows else replace(direction, chunk_size=max(rows, 1))
    most = max(columns, MODEST_BYTES // NUMBER // max(rows, 1), 1)
    return direction if rows <= most else replace(direction, chunk_size=most)


def rows_first(plan: Plan, one: JacobianOperator) -> Plan:
    """The plan for samples, without forward mode among what to try where columns outnumber rows.

    There a loop over samples is cheaper, and it needs no seed for each column. ``one`` is a sample.
    """
    if numel(one.primals) <= numel(one.outputs):
        return plan
    return replace(plan, otherwise=tuple(d for d in plan.otherwise if not d.sweeps.are_pushes))


def blocks_by(plan: Plan, sink: Sink, operator: JacobianOperator) -> Blocks:
    """Blocks by the plan's strategy; what ran, why and how long is logged where someone listens."""
    if not is_heard():
        return blocks_into(sink, plan.strategy, operator)
    start = time.perf_counter()
    blocks = blocks_into(sink, plan.strategy, operator)
    took = in_seconds(time.perf_counter() - start)
    note("%s ran: %s; took %s", plan.strategy, plan.reason, took)
    return blocks
