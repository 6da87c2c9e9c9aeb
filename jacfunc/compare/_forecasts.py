"""What each strategy would take, said before anything is measured, and which need not be tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from jacfunc._calls import Derivation
from jacfunc._forecasting import CallForecast, Costs, counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._log import note
from jacfunc._measuring import Result, seconds_of
from jacfunc._memory import free_bytes
from jacfunc._planning import BUDGET_SHARE, resolve
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._problem import API, Problem
from jacfunc.strategies import Looped, Strategy, Sweeping

LONG, FAR = 60.0, 20.0
"""A call is not tried that would take so many seconds, and so many times the shortest call."""

Needs = tuple[float | None, int | None, int]
"""Seconds and peak bytes of a call, None if not known, and the bytes that it takes at least."""

NOTHING_KNOWN: Needs = (None, None, 0)


def foretell(
    problem: Problem, strategies: Mapping[str, str | Strategy], results: Sequence[Result]
) -> None:
    """Write into each result what its strategy, which has the same name, would take.

    A result that need not be tried gets the reason as its status: a process that is killed has no
    table. Nothing is said of auto and autotune, which choose for themselves.
    """
    resolved = {name: resolve(API, strategy, None) for name, strategy in strategies.items()}
    swept = {name: s for name, s in resolved.items() if isinstance(s, Sweeping)}
    try:
        needs = (
            _of_function(problem, swept) if problem.module is None else _of_module(problem, swept)
        )
    except Exception as error:  # the measured rows will say what is wrong; there is no forecast
        note("nothing is forecast: %s", error)
        return
    shortest = min((seconds for seconds, _, _ in needs.values() if seconds), default=0.0)
    for result in results:
        name = result.contestant
        result.forecast_seconds, result.forecast_bytes, _ = needs.get(name, NOTHING_KNOWN)
        # torch's own recipe is a reverse sweep, too
        sweep = needs.get(name if name in strategies else "reverse", NOTHING_KNOWN)
        result.status = _obstacle(sweep, free_bytes(problem.device), shortest) or result.status


def _obstacle(needs: Needs, free: int, shortest: float) -> str | None:
    """Why a call should not be tried."""
    seconds, peak, least = needs
    if peak is not None and peak > free:
        return f"out of memory: forecast {in_bytes(peak)}, {in_bytes(free)} free"
    if least > BUDGET_SHARE * free:
        return f"out of memory: forecast {in_bytes(least)} at least, {in_bytes(free)} free"
    if seconds is not None and seconds > max(LONG, FAR * shortest):
        return f"out of time: forecast {in_seconds(seconds)} a call"
    return None


def _of_function(problem: Problem, strategies: Mapping[str, Sweeping]) -> dict[str, Needs]:
    """What strategies would take of a function, evaluated as :func:`jacfunc.estimate` does it."""
    derivation = Derivation(API, problem.target, problem.argnums)
    call = CallForecast(derivation, problem.args, dict(problem.kwargs))
    forecasts = {name: call.forecast(strategy) for name, strategy in strategies.items()}
    return {name: (cost.seconds, cost.peak_bytes, 0) for name, cost in forecasts.items()}


def _of_module(problem: Problem, strategies: Mapping[str, Sweeping]) -> dict[str, Needs]:
    """What strategies would take of a module, by the costs of one sample, as auto forecasts it."""
    (costs, extra), samples = _costs_of_sample(problem), problem.size()
    if costs is None:
        return {}
    batch = costs.times(samples)
    return {
        name: (batch.seconds(strategy), None, batch.least_bytes(strategy))
        if strategy.sweeps.is_vmapped
        else (samples * (extra(costs.rows) + costs.seconds(strategy)), None, 0)
        for name, strategy in strategies.items()
    }


class Beyond(NamedTuple):
    """Seconds beyond what operations are forecast to take, of an evaluation and of a pullback.

    A module is lent for an evaluation, and one operation may be a whole recurrent layer.
    """

    evaluation: float = 0.0
    pullback: float = 0.0

    def __call__(self, rows: int) -> float:
        return self.evaluation + rows * self.pullback


def _costs_of_sample(problem: Problem) -> tuple[Costs | None, Beyond]:
    """Costs of one sample, or of the batch as a whole, evaluated as jacfunc does it."""
    call = problem.call()
    with call.undisturbed():
        one_sample = problem.is_sampled and call.batch(problem.batching).call_of_sample(0)
        flat = one_sample or call.flat_call()
        operator = JacobianOperator(flat, flat.primals)
        costs = counted_costs(operator)
        if costs is None:
            return None, Beyond()
        device, evaluated = problem.device, operator.unevaluated()
        seeds = tuple(map(torch.ones_like, evaluated.outputs))
        took = seconds_of(lambda: operator.unevaluated().outputs, device)
        pulled = seconds_of(lambda: evaluated.pullback(seeds), device)
        evaluation = costs.evaluation()
        row = (costs.seconds(Looped()) - evaluation) / max(costs.rows, 1)
        return costs, Beyond(max(0.0, took - evaluation), max(0.0, pulled - row))
