"""What it takes to compile a derivative, and after how many calls that is repaid."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from jacfunc._forecasting.costs import Costs
from jacfunc._forecasting.machine import Cost
from jacfunc._forecasting.machines import COSTS
from jacfunc._memory import largest
from jacfunc._units import in_calls, in_seconds
from jacfunc.strategies import Sweeping


@dataclass(frozen=True)
class Compilation:
    """What compiling one kind of call cost, or would cost, and what it saves.

    Args:
        trace_seconds: for the traces.
        compile_seconds: for what runs them, its first run included.
        eager_seconds: what the derivative itself took.
        call_seconds: what the compiled call took.
        operators: how many operators of torch the trace has.
        constant_bytes: what is kept from call to call, beside code: seeds and the like; None in a
            forecast.
        peak_bytes: of all tensors at once in a compiled call, with the result, without arguments
            and constants: of the trace operator by operator, of which ``"inductor"`` fuses some;
            a CUDA graph keeps them from call to call. None in a forecast.
        backend: what compiled it, or would.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.compile(jacfunc.jacrev(torch.sin), backend="replay")
        >>> _ = jac(torch.zeros(2))
        >>> jac.compilations[0].calls_to_repay > 1
        True
        >>> jac.compilations[0].peak_bytes >= 16  # the result alone
        True
    """

    trace_seconds: float
    compile_seconds: float
    eager_seconds: float
    call_seconds: float
    operators: int
    constant_bytes: int | None = None
    peak_bytes: int | None = None
    backend: str = "inductor"

    @property
    def build_seconds(self) -> float:
        """What was spent before the first compiled call."""
        return self.trace_seconds + self.compile_seconds

    @property
    def calls_to_repay(self) -> float:
        """After so many calls less time was spent than without; infinite if a call saves none."""
        saved = self.eager_seconds - self.call_seconds
        return self.build_seconds / saved if saved > 0 else float("inf")


def price_in_words(price: Compilation | None) -> tuple[str, str, str]:
    """The time of a compiled call, the time before the first, and the calls that repay it."""
    if price is None:
        return in_seconds(None), in_seconds(None), in_calls(None)
    seconds = price.call_seconds, price.build_seconds
    return in_seconds(seconds[0]), in_seconds(seconds[1]), in_calls(price.calls_to_repay)


class Speed(NamedTuple):
    """How fast a backend is, in units of what torch takes for one operation without its work.

    Args:
        start: what it takes to compile anything.
        each: what it takes to compile an operator.
        run: what an operator takes in a compiled call.
    """

    start: float
    each: float
    run: float


SPEEDS: Mapping[str, Speed] = MappingProxyType(
    {"inductor": Speed(6e5, 2900.0, 0.4), "replay": Speed(0.0, 0.0, 1.0)}
)
"""The speeds of backends, measured on perceptrons of 2 to 13 layers on one core."""

TRACED = 400.0
"""Traces take so many times what Python and torch's dispatcher take in a call."""

CALLED = 0.25
"""What a compiled call takes beside its operators, as a share of what an evaluation does."""


def compilation_by(backend: str, costs: Costs, strategy: Sweeping) -> Compilation | None:
    """What a backend would take for the strategy; None for one of which little is known."""
    speed = SPEEDS.get(backend)
    if speed is None:
        return None
    seconds, work = costs.seconds(strategy), _without_overhead(costs).seconds(strategy)
    unit, count = costs.speeds.evaluate, _operators(costs, strategy)
    return Compilation(
        TRACED * (seconds - work),
        unit.operation * (speed.start + speed.each * count),
        seconds,
        work + CALLED * unit.call + speed.run * unit.operation * count,
        count,
        backend=backend,
    )


def _operators(costs: Costs, strategy: Sweeping) -> int:
    """How many operators a trace has, in which every sweep is written out."""
    total = costs.seeds(strategy)
    sweeps = (
        1 if strategy.sweeps.by_layers else -(-total // largest(strategy.sweeps.chunk_size, total))
    )
    share = 1.35 * sweeps if strategy.sweeps.are_pushes else 0.25 + 0.5 * sweeps
    return max(1, round(share * len(costs.operations)))


def _without_overhead(costs: Costs) -> Costs:
    """Costs on a machine that takes time for numbers alone."""
    speeds, nothing = copy(costs.speeds), Cost(0.0, 0.0)
    speeds.know(dict.fromkeys(COSTS, nothing), scaling=0.0)
    return replace(costs, speeds=speeds)
