"""A budget of bytes for the work of one call, which is counted as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from jacfunc._memory.chunks import GROWTH, SHARE, Chunk, FittedChunks, evenly
from jacfunc._memory.counting import PeakBytes
from jacfunc._memory.heap import at_most, give_back, sparing
from jacfunc._memory.limits import MOST_SWEPT_BYTES, STAGED_BYTES
from jacfunc._types import Leaves
from jacfunc._units import in_bytes

ResultT = TypeVar("ResultT")

HEAP_SHARE = 2
"""A piece counts at most this part of its room: the heap of a CPU takes more than its tensors."""

PLENTY = 4
"""Where so many times all samples would fit, by what some take, the others come at once, and are
not counted."""


class Budget:
    """How many bytes the work of a call may take, and how many it keeps from piece to piece.

    Args:
        nbytes: the limit; None if there is none.
    """

    def __init__(self, api: str, nbytes: int | None) -> None:
        self._api, self._nbytes = api, nbytes
        self.is_open = nbytes is None
        """Is there no limit?"""
        self.counted = 0
        """Bytes that the piece took which was counted last."""
        if nbytes is not None:
            self._counter = PeakBytes()

    def around(self) -> AbstractContextManager[None]:
        """A context for the work on this budget."""
        return sparing(self._nbytes)

    def keeping(self) -> AbstractContextManager[Any]:
        """A context in which what is made is kept from piece to piece."""
        return nullcontext() if self._nbytes is None else self._counter

    def room(self, blocks: int) -> int | None:
        """Bytes left beside a block and the one before, which a loop still has: so many bytes."""
        if self._nbytes is None:
            return None
        taken = self._counter.live + blocks
        if taken >= self._nbytes:
            raise ValueError(
                f"{self._api}: memory must hold what is kept for all blocks and two blocks, "
                f"{in_bytes(taken)}, got {in_bytes(self._nbytes)}. Give more, or take smaller "
                "blocks: by rows, by samples, or of fewer samples."
            )
        return self._nbytes - taken

    def chunk(self, size: int | None, total: int, block: int) -> Chunk:
        """How many of all rows or samples a block has, of so many bytes each; at most ``size``."""
        room = self.room(2 * block)
        if room is None:
            return size or evenly(total, block, max(STAGED_BYTES, total * block // SHARE))
        return FittedChunks(block + room * 2 // 5, size)  # beside the one before, and the heap's

    def beside(self, result: int) -> int | None:
        """Bytes left for work beside what is kept and a result of this size."""
        return None if self._nbytes is None else self._nbytes - self._counter.live - result

    def cotangents(self, total: int, each: int) -> int:
        """How many cotangents, whose factors take so many bytes each, are pulled back at once.

        What lies between layers may take as much again, and more. Without a budget it is all.
        """
        if self.is_open:
            return total
        with self.around():
            return evenly(total, each, at_most(MOST_SWEPT_BYTES))

    def keep(self, work: Callable[[], ResultT]) -> ResultT:
        """What ``work`` returns, which is kept from now on; it can't be done in pieces.

        Raises:
            ValueError: if that takes more than the budget.
        """
        if self._nbytes is None:
            return work()
        before = self._counter.live
        with self._counter, PeakBytes() as counter:
            result = work()
        self._check(before + counter.peak)
        return result

    def check_work(self, work: int, result: int) -> None:
        """Refuse a budget without room for work beside what is kept and a result, in bytes."""
        self._check(self._counter.live + work + result)

    def _check(self, taken: int) -> None:
        if self._nbytes is not None and taken > self._nbytes:
            raise ValueError(
                f"{self._api}: memory must hold the result, what is kept for it, and the work on "
                f"one sample, {in_bytes(taken)}, got {in_bytes(self._nbytes)}. Give more, or "
                "choose fewer parameters with select=."
            )

    def pieces(
        self,
        total: int,
        at_most: int | None,
        work: Callable[[int, int], Leaves],
        result: int = 0,
        spare: Callable[[], int] = int,
    ) -> Iterator[Leaves]:
        """What ``work(start, stop)`` returns of consecutive samples, as many at once as fit.

        One sample comes first, which must fit, and two after it: one alone may be spared some
        copies. Where memory is plenty, all others come after it. Where n samples take b bytes, k·n
        take at most k·b. No piece is done twice, as work may add to a sum. Free pages of the heap
        go back before each piece: they lie between what is kept, and what comes next may fit
        nowhere there.

        Args:
            at_most: samples at once; None for no limit.
            result: bytes of what the pieces add up to, beside those of all that ``work`` returns.
            spare: bytes that ``work`` may keep beside that, if one sample leaves them.

        Raises:
            ValueError: if one sample takes more than the budget.
        """
        most = min(at_most or total, total)
        start, step, is_settled = 0, most if self.is_open else 1, self.is_open
        while start < max(total, 1):
            stop = min(start + step, total)
            if not self.is_open:
                give_back()
            if is_settled:
                yield work(start, stop)
                start = max(stop, 1)
                continue
            before = self._counter.live
            with PeakBytes() as counter:
                answer = work(start, stop)
            # what was there before, and was only for this piece, is there anew for the next one
            self.counted = counter.peak + max(0, before - self._counter.live)
            if start == 0:
                result += sum(leaf.nbytes for leaf in answer) * total // max(stop, 1)
            yield answer
            del answer  # or it would stay beside the next one
            room = self.beside(result)
            assert room is not None
            if step == 1:
                self._check(before + counter.peak + result)
            of_piece = step * max(room - spare(), 0) // (HEAP_SHARE * max(self.counted, 1))
            is_plenty = of_piece >= PLENTY * most
            fitting = min(most if step > 1 or is_plenty else min(most, 2), max(1, of_piece))
            is_settled = is_plenty or (start > 0 and step <= fitting <= GROWTH * step)
            start, step = max(stop, 1), fitting
