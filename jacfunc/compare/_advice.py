"""What results say: which is best, which are on the front, and what to take, in a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from jacfunc._arguments import check_memory
from jacfunc._measuring import Result, Spread, spread_of
from jacfunc._types import Memory
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._contestants import PLANNED
from jacfunc.compare._problem import API

TIE = 1.05
"""A result is as fast as the fastest if it takes up to so many times its time."""

LITTLE = 0.8
"""A slower result is named for its memory only below this share of what all faster ones take."""

NOT_ENOUGH = "jacfunc.stream_jacobian or products (jacfunc.jvp, vjp, ntk, ggn)"


def timed(results: Sequence[Result]) -> list[Result]:
    """The results with a right answer."""
    return [result for result in results if result.ok and result.time is not None]


def best(results: Sequence[Result]) -> Result | None:
    """The fastest result; of the strategies that are as fast, the first."""
    return _first(_as_fast(timed(results)))


def front(results: Sequence[Result]) -> list[Result]:
    """The fastest result, and from there on each that takes clearly less memory than all before."""
    unbeaten: list[Result] = []
    least = math.inf
    for result in sorted(timed(results), key=lambda r: (_duration(r).median, r.peak_bytes or 0)):
        if result.peak_bytes is not None and result.peak_bytes < LITTLE * least:
            least = result.peak_bytes
            unbeaten.append(result)
    return unbeaten


def reasons(results: Sequence[Result]) -> list[str]:
    """Why contestants have no time: one entry a reason, with their names."""
    names: dict[str, list[str]] = {}
    for result in results:
        if not result.ok:
            names.setdefault(result.status, []).append(result.contestant)
    return [f"{', '.join(failed)}: {status}" for status, failed in names.items()]


def sentence(results: Sequence[Result], baseline: str, memory: Memory) -> str:
    """What to take, and what to take where memory is short."""
    right, take = timed(results), best(results)
    if take is None:
        return f"No strategy gave a right answer: {'; '.join(reasons(results))}."
    if not any(result.family == "jacfunc" for result in right):
        only = f"Only {take.contestant} itself gave a right answer"
        return f"{only}: {'; '.join(reasons(results))}."
    is_baseline = take.family != "jacfunc"
    why = "no strategy is as fast here" if is_baseline else _figures(take, baseline)
    ties = [result.contestant for result in _as_fast(right) if result is not take]
    as_fast = f" (as fast: {', '.join(ties)})" if ties else ""
    short = _where_memory_is_short(right, take, baseline, memory)
    return f"Take {_code(take, memory)}: {why}{as_fast}{short}."


def _where_memory_is_short(
    right: Sequence[Result], take: Result, baseline: str, memory: Memory
) -> str:
    """Another strategy, if one takes less memory, or keeps to the memory that was set."""
    budget, room = check_memory(API, memory), str(memory)
    if budget is None:
        budget, room = int(LITTLE * (take.peak_bytes or 0)), in_bytes(take.peak_bytes)
    elif take.peak_bytes is not None and take.peak_bytes <= budget:
        return f"; it keeps to a memory of {room}"
    fits = [r for r in right if r.peak_bytes is not None and r.peak_bytes <= budget]
    other = _first(_as_fast(fits))
    if other is not None:
        code, figures = _code(other, memory), _figures(other, baseline)
        return f"; under a memory of {room} take {code}: {figures}"
    if memory is None:
        return ""
    return f"; nothing keeps to a memory of {room}, for which there are {NOT_ENOUGH}"


def _figures(result: Result, baseline: str) -> str:
    """Time, in units of the baseline, and peak."""
    time = in_seconds(result.time.median if result.time else None)
    if result.ratio is not None and result.contestant != baseline:
        time = f"{spread_of(result.ratio)} of the time of {baseline}"
    return f"{time}, {in_bytes(result.peak_bytes)} at its peak"


def _code(result: Result, memory: Memory) -> str:
    """The contestant as a user writes it."""
    name = result.contestant
    if result.family != "jacfunc":
        return f"{name} itself"
    if not name.isidentifier():
        return f"strategy={name}"
    budget = f", memory={json.dumps(memory)}" if memory and name in PLANNED else ""
    return f'strategy="{name}"{budget}'


def _duration(result: Result) -> Spread:
    """The time in units of the baseline's, or in seconds where the baseline has failed."""
    duration = result.ratio or result.time
    assert duration is not None
    return duration


def _as_fast(results: Sequence[Result]) -> list[Result]:
    """The fastest, and all within a few percent of it, or faster in a quarter of the rounds."""
    shortest = min((_duration(result).median for result in results), default=0.0)
    return [
        result
        for result in results
        if _duration(result).median <= TIE * shortest or _duration(result).low <= shortest
    ]


def _first(results: Sequence[Result]) -> Result | None:
    """The first strategy of jacfunc's; where there is none, the first result."""
    strategies = [result for result in results if result.family == "jacfunc"]
    return next(iter((*strategies, *results)), None)
