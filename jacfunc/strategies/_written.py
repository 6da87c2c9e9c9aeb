"""Rows or columns of a function of one tensor, written down as operators on what autograd saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jacfunc._log import note
from jacfunc._measuring import ROUNDS, InTurn, Run, seconds_of
from jacfunc._torch import Graphs, RandomState, holds_nan
from jacfunc._traces import (
    MOST_BYTES,
    MOST_MISSES,
    Sources,
    WrittenWork,
    fingerprint,
    outline,
)
from jacfunc._types import Leaves
from jacfunc.strategies._strategy import Sweeps

MOST_ROWS = 16
"""More are not written down one by one: programs of thousands of operators are slow to make."""


class SweepablePoint(Protocol):
    """A function evaluated at a point."""

    @property
    def out(self) -> Any: ...

    @property
    def starts(self) -> dict[Any, int]: ...

    def block(self, sweeps: Sweeps) -> Tensor:
        """The block of the output, from sweeps of its graph."""


PointT = TypeVar("PointT", bound=SweepablePoint)
Evaluate = Callable[[Tensor], PointT]
Replay = Callable[[Leaves], Leaves | None]
"""Makes a block of what was saved; None where it does not hold."""


class WrittenBlock(Generic[PointT]):
    """Sweeps of all rows, or columns, as a straight program, which reads what autograd has saved.

    It holds for evaluations whose graphs have the same outline, and no hooks. So a function may
    branch, write, and close over what changes from call to call: what leads elsewhere is swept, and
    not evaluated anew, as a function that draws its way would then take rare ways more rarely.

    Args:
        evaluate: evaluates the function at a point.
        ways: to the block, written down; the fastest is found out as calls take them in turn.
        outline: of the graphs for which it holds.
    """

    def __init__(self, evaluate: Evaluate[PointT], ways: Sequence[Replay], outline: Any) -> None:
        self._evaluate, self._outline = evaluate, outline
        self._ways, self._misses = InTurn(ways), 0

    @property
    def is_kept(self) -> bool:
        """Has it held of late?"""
        return self._misses < MOST_MISSES

    def at(self, x: Tensor) -> tuple[Saved[PointT], Tensor | None] | None:
        """The function at a point, and the block; None for this where what is known does not hold.

        None for both if the evaluation can't be swept, as not all is there as it was saved.
        """
        block, saved, ways = None, Saved.at(x, self._evaluate), self._ways
        is_whole = saved.sources.are_as_saved
        if is_whole and saved.outline == self._outline:
            replay = partial(ways.way, saved.leaves)
            with torch.set_grad_enabled(False):
                made = replay() if ways.is_over else ways.timed(replay, x)
            (block,) = made or (None,)
        self._misses = 0 if block is not None else self._misses + 1
        return (saved, block) if is_whole else None


class Saved(NamedTuple, Generic[PointT]):
    """An evaluation, what was saved for its backward pass, and the outline of its graph."""

    evaluated: PointT
    sources: Sources
    outline: Any

    @classmethod
    def at(cls, x: Tensor, evaluate: Evaluate[PointT]) -> Self:
        """One at this point, which has no outline if it sets hooks, as these may do anything."""
        sources, hooks, first = Sources(moments=[]), RemovableHandle.next_id, Graphs.num_nodes()
        with sources.saving():
            at = evaluate(x)
        if type(at.out) is not Tensor or RemovableHandle.next_id != hooks:
            return cls(at, sources, None)
        return cls(at, sources, outline(at.out, at.starts, first, sources))

    @property
    def leaves(self) -> Leaves:
        """All that rows are made of."""
        return *self.sources.saved, self.evaluated.out

    @property
    def fingerprint(self) -> Any:
        """What is equal for evaluations that are equal, without their tensors."""
        return self.outline, list(map(fingerprint, self.leaves))

    def written(self, sweeps: Sweeps) -> WrittenWork | None:
        """The sweeps of the block, written down; None if they can't be."""

        def swept() -> Leaves:
            return (self.evaluated.block(sweeps),)

        try:
            return WrittenWork(swept, self.leaves)
        except Exception as error:  # calls are swept as before
            note("%s of a settled kind of call are not written down: %s", sweeps.over, error)
            return None


def written_block(
    begun: Callable[[], Evaluate[PointT]],
    x: Tensor,
    expected: Tensor,
    ways: Iterable[Sweeps],
    is_pushed: bool = False,
    seconds: float = inf,
) -> WrittenBlock[PointT] | None:
    """The block at a point, written down; None if it can't be, or if it would not pay.

    Args:
        begun: returns what evaluates the function, or raises if that is not to be had.
        expected: the block at this point.
        ways: how it may be swept. The fastest is found out once all are written down, as then a
            batch costs no more calls than a row, and a tangent no more than a cotangent.
        is_pushed: is it swept by columns as long as nothing is written down?
        seconds: it would not pay from so many on.
    """
    are_many = expected.numel() > MOST_ROWS * x.numel()
    ways = [way for way in ways if way.is_vmapped or not are_many]
    if not ways or expected.nbytes > MOST_BYTES:
        return None
    random_state = RandomState((x,))
    try:
        return _written_block(begun(), x, expected, ways, is_pushed, seconds)
    except Exception as error:  # it goes on as before
        note("a settled kind of call is not written down: %s", error)
        return None
    finally:
        random_state.repeat()


def _written_block(
    evaluate: Evaluate[PointT],
    x: Tensor,
    expected: Tensor,
    ways: list[Sweeps],
    is_pushed: bool,
    most_seconds: float,
) -> WrittenBlock[PointT] | None:
    saved = Saved.at(x, evaluate)
    if saved.outline is None:
        return None
    works = [(work, way) for way in ways if (work := saved.written(way)) is not None]
    known = saved.fingerprint
    del saved  # before there is another one
    saved = Saved.at(x, evaluate)
    if not saved.sources.are_as_saved or saved.fingerprint != known:
        return None
    fit: list[Replay] = []
    with torch.set_grad_enabled(False):
        for work, way in works:
            work.hold_for(saved.leaves)
            if work.gives(saved.leaves, (expected,)):
                is_checked = is_pushed or way.are_pushes
                replay = partial(_without_nan, work.result) if is_checked else work.result
                if _takes_less(most_seconds, partial(replay, saved.leaves), x.device):
                    fit.append(replay)
    return WrittenBlock(evaluate, fit, saved.outline) if fit else None


def _takes_less(seconds: float, run: Run, device: torch.device) -> bool:
    """Does a run take less than so many seconds? Only where that is a limit is it timed."""
    return seconds == inf or min(seconds_of(run, device) for _ in range(ROUNDS)) < seconds


def _without_nan(replay: Replay, leaves: Leaves) -> Leaves | None:
    """A block; None where there is a nan, as of columns nobody knows what made one."""
    made = replay(leaves)
    return None if made is None or holds_nan(made[0]) else made
