"""What each strategy would take, said before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jacfunc._assembly import Sink
from jacfunc._calls import Derivation
from jacfunc._forecasting import CallForecast, Costs, Swept, counted_costs
from jacfunc._linear_map import JacobianOperator, one_sample
from jacfunc._log import note
from jacfunc._memory import free_bytes
from jacfunc._planning import SHARE, resolve
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._problem import API, Problem
from jacfunc.strategies import Looped, Strategy

LONG, FAR = 60.0, 20.0
"""A call is not tried that would take so many seconds, and so many times the shortest call."""

Needs = tuple[float | None, int | None, int]
"""Seconds and peak bytes of a call, None where they are not known, and the bytes that it takes at
least."""

UNKNOWN: Needs = (None, None, 0)


def needs_of(problem: Problem, strategies: Sequence[str | Strategy]) -> list[Needs]:
    """What each strategy would take; of auto and autotune, which choose for themselves, nothing.

    A function is evaluated as :func:`jacfunc.estimate` does it. Of a module one sample is
    evaluated, and the seconds are those by which auto chooses.
    """
    try:
        forecast = _of_module(problem) if problem.module else _of_function(problem)
    except Exception as error:  # the measured rows will say what is wrong; there is no forecast
        note("nothing is forecast: %s", error)
        return [UNKNOWN] * len(strategies)
    resolved = [resolve(API, strategy, None) for strategy in strategies]
    return [forecast(s) if isinstance(s, Swept) else UNKNOWN for s in resolved]


def obstacle(needs: Needs, problem: Problem, shortest: float) -> str | None:
    """Why a call should not be tried: a process that is killed has no table."""
    (seconds, peak, least), free = needs, free_bytes(problem.device)
    if peak is not None and peak > free:
        return f"out of memory: forecast {in_bytes(peak)}, {in_bytes(free)} free"
    if least > SHARE * free:
        return f"out of memory: forecast {in_bytes(least)} at least, {in_bytes(free)} free"
    if seconds is not None and seconds > max(LONG, FAR * shortest):
        return f"out of time: forecast {in_seconds(seconds)} a call"
    return None


def _of_function(problem: Problem) -> Callable[[Swept], Needs]:
    derivation = Derivation(API, problem.target, problem.argnums)
    call = CallForecast(derivation, problem.args, dict(problem.kwargs))

    def needs(strategy: Swept) -> Needs:
        forecast = call.forecast(strategy)
        return forecast.seconds, forecast.peak_bytes, 0

    return needs


def _of_module(problem: Problem) -> Callable[[Swept], Needs]:
    costs, samples = _costs_of_sample(problem), problem.size()

    def needs(strategy: Swept) -> Needs:
        if costs is None:
            return UNKNOWN
        if isinstance(strategy, Looped):
            return samples * costs.seconds(strategy), None, 0
        batch = costs.times(samples)
        return batch.seconds(strategy), None, batch.least_bytes(strategy)

    return needs


def _costs_of_sample(problem: Problem) -> Costs | None:
    """Costs of one sample, or of the batch as a whole, evaluated as jacfunc does it."""
    call = problem.call()
    with call.undisturbed():
        if problem.is_sampled:
            batch = call.batch(Sink(), problem.in_dims, problem.randomness)
            flat = batch.call_of(one_sample(batch.leaves, batch.dims, 0))
        else:
            flat = call.flat_call(call.arguments, None)
        return counted_costs(JacobianOperator(flat, flat.primals))
