"""Ways to one result that calls take in turn, until it is known which one is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Generic, TypeVar

import torch
from torch import Tensor

from jacfunc._measuring.clock import Run, seconds_of

WayT = TypeVar("WayT")
ResultT = TypeVar("ResultT")

Clock = Callable[[Run, torch.device], float]

ROUNDS = 5
"""So often every way is timed, each in turn, so that a busy machine is busy for all of them."""


class InTurn(Generic[WayT]):
    """Ways to the same result, of which the fastest is found out by the calls that need one.

    No call does for the clock what it would not do else: that might draw numbers, or take memory.

    Args:
        ways: one or more; of equal ones the first is kept.
        clock: gives the seconds of a call.
    """

    def __init__(self, ways: Sequence[WayT], clock: Clock = seconds_of) -> None:
        self._ways, self._seconds, self._turns = ways, [inf] * len(ways), 0
        self._clock = clock
        self.way, self.is_over = ways[0], len(ways) == 1
        """The way that the next call takes. Do all later ones take it, too?"""

    def timed(self, run: Callable[[], ResultT | None], *args: Tensor) -> ResultT | None:
        """What a call with these tensors makes by its way; None is no result, and no turn."""
        made: list[ResultT | None] = []
        number, seconds = self._turns % len(self._ways), self._seconds  # others may call meanwhile
        took = self._clock(lambda: made.append(run()), args[0].device)
        if made[0] is not None:
            seconds[number] = min(seconds[number], took)
            self._turns += 1
            self.is_over = self._turns >= ROUNDS * len(self._ways)
            following = seconds.index(min(seconds)) if self.is_over else self._turns
            self.way = self._ways[following % len(self._ways)]
        if self.is_over:
            self._ways = (self.way,)  # the others need not be kept
        return made[0]
