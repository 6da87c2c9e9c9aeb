"""What to take, from what was measured: in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jacfunc._arguments import check_memory
from jacfunc._measuring import Result, Spread, spread
from jacfunc._types import Memory
from jacfunc._units import in_bytes, in_seconds
from jacfunc.compare._contestants import PLANNED
from jacfunc.compare._problem import API

TIE = 1.05
"""A result is as fast as the fastest if it takes up to so many times its time."""

LITTLE = 0.8
"""Less memory is worth a word only below that share of the memory of the fastest."""

NOT_ENOUGH = "jacfunc.stream_jacobian or products (jacfunc.jvp, vjp, ntk, ggn)"


@dataclass(frozen=True)
class Advice:
    """What the results of a comparison say.

    Args:
        results: one a contestant.
        baseline: the contestant whose time is 1.
        memory: bytes that auto and autotune were to keep to.
    """

    results: Sequence[Result]
    baseline: str
    memory: Memory

    @property
    def timed(self) -> list[Result]:
        """The results with a right answer."""
        return [result for result in self.results if result.ok and result.time is not None]

    @property
    def best(self) -> Result | None:
        """The fastest result; of the strategies that are as fast, the first."""
        return _first(_as_fast(self.timed))

    @property
    def front(self) -> list[Result]:
        """The fastest result, and from there on each that takes less memory than all before."""
        front: list[Result] = []
        least = math.inf
        for result in sorted(self.timed, key=lambda r: (_duration(r).median, r.peak_bytes or 0)):
            if result.peak_bytes is not None and result.peak_bytes < least:
                least = result.peak_bytes
                front.append(result)
        return front

    def sentence(self) -> str:
        """What to take, and what to take where memory is short."""
        best = self.best
        if best is None:
            return f"No strategy gave a right answer: {'; '.join(self.reasons())}."
        if not any(result.family == "jacfunc" for result in self.timed):
            only = f"Only {best.contestant} itself gave a right answer"
            return f"{only}: {'; '.join(self.reasons())}."
        why = self._figures(best) if best.family == "jacfunc" else "no strategy is as fast here"
        ties = [result.contestant for result in _as_fast(self.timed) if result is not best]
        as_fast = f" (as fast: {', '.join(ties)})" if ties else ""
        return f"Take {self._code(best)}: {why}{as_fast}{self._where_memory_is_short(best)}."

    def reasons(self) -> list[str]:
        """Why contestants have no time: one entry a reason, with their names."""
        failed: dict[str, list[str]] = {}
        for result in self.results:
            if not result.ok:
                failed.setdefault(result.status, []).append(result.contestant)
        return [f"{', '.join(names)}: {status}" for status, names in failed.items()]

    def _where_memory_is_short(self, best: Result) -> str:
        """Another strategy, if one takes less memory, or keeps to the memory that was set."""
        budget, room = check_memory(API, self.memory), str(self.memory)
        if budget is None:
            budget, room = int(LITTLE * (best.peak_bytes or 0)), in_bytes(best.peak_bytes)
        elif best.peak_bytes is not None and best.peak_bytes <= budget:
            return f"; it keeps to a memory of {room}"
        fits = [r for r in self.timed if r.peak_bytes is not None and r.peak_bytes <= budget]
        other = _first(_as_fast(fits))
        if other is not None:
            return f"; under a memory of {room} take {self._code(other)}: {self._figures(other)}"
        if self.memory is None:
            return ""
        return f"; nothing keeps to a memory of {room}, for which there are {NOT_ENOUGH}"

    def _figures(self, result: Result) -> str:
        time = in_seconds(result.time.median if result.time else None)
        if result.ratio is not None and result.contestant != self.baseline:
            time = f"{spread(result.ratio)} of the time of {self.baseline}"
        return f"{time}, {in_bytes(result.peak_bytes)} at its peak"

    def _code(self, result: Result) -> str:
        """The contestant as a user writes it."""
        name = result.contestant
        if result.family != "jacfunc":
            return f"{name} itself"
        if not name.isidentifier():
            return f"strategy={name}"
        budget = f", memory={json.dumps(self.memory)}" if self.memory and name in PLANNED else ""
        return f'strategy="{name}"{budget}'


def _duration(result: Result) -> Spread:
    """The time in units of the baseline, whose rounds were as busy; in seconds, if that failed."""
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
