"""Rows or columns of a function of one tensor, written down as operators on what autograd saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from timeit import timeit
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jacfunc._log import note
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

ROUNDS = 5
"""So often every way is timed, each in turn, so that a busy machine is busy for all of them."""


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


class WrittenBlock(Generic[PointT]):
    """Sweeps of all rows, or columns, as a straight program, which reads what autograd has saved.

    It holds for evaluations whose graphs have the same outline, and no hooks. So a function may
    branch, write, and close over what changes from call to call: what leads elsewhere is swept, and
    not evaluated anew, as a function that draws its way would then take rare ways more rarely.

    Args:
        evaluate: evaluates the function at a point.
        work: the block, written down.
        outline: of the graphs for which it holds.
        is_checked: does it not hold where there is a nan? Of columns nobody knows what made one.
    """

    def __init__(
        self, evaluate: Evaluate[PointT], work: WrittenWork, outline: Any, is_checked: bool
    ) -> None:
        self._evaluate, self._outline, self._is_checked = evaluate, outline, is_checked
        self._work, self._misses = work, 0

    @property
    def is_kept(self) -> bool:
        """Has it held of late?"""
        return self._misses < MOST_MISSES

    def at(self, x: Tensor) -> tuple[Saved[PointT], Tensor | None] | None:
        """The function at a point, and the block; None for this where what is known does not hold.

        None for both if the evaluation can't be swept, as not all is there as it was saved.
        """
        block, saved = None, Saved.at(x, self._evaluate)
        is_whole = saved.sources.are_as_saved
        if is_whole and saved.outline == self._outline:
            with torch.set_grad_enabled(False):
                (block,) = self._work.result(saved.leaves) or (None,)
            if block is not None and self._is_checked and holds_nan(block):
                block = None
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
) -> WrittenBlock[PointT] | None:
    """The block at a point, written down; None if it can't be, or if it would not pay.

    Args:
        begun: returns what evaluates the function, or raises if that is not to be had.
        expected: the block at this point.
        ways: how it may be swept. The fastest is found out once all are written down, as then a
            batch costs no more calls than a row, and a tangent no more than a cotangent.
        is_pushed: is it swept by columns as long as nothing is written down?
    """
    are_many = expected.numel() > MOST_ROWS * x.numel()
    ways = [way for way in ways if way.is_vmapped or not are_many]
    if not ways or expected.nbytes > MOST_BYTES:
        return None
    random_state = RandomState((x,))
    try:
        return _written_block(begun(), x, expected, ways, is_pushed)
    except Exception as error:  # it goes on as before
        note("a settled kind of call is not written down: %s", error)
        return None
    finally:
        random_state.repeat()


def _written_block(
    evaluate: Evaluate[PointT], x: Tensor, expected: Tensor, ways: list[Sweeps], is_pushed: bool
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
    fit: list[tuple[WrittenWork, bool]] = []

    def run(work: WrittenWork, is_checked: bool) -> None:
        result = work.result(saved.leaves)
        if result is not None and is_checked:
            holds_nan(result[0])

    with torch.set_grad_enabled(False):
        for work, way in works:
            work.hold_for(saved.leaves)
            if work.gives(saved.leaves, (expected,)):
                fit.append((work, is_pushed or way.are_pushes))
        rounds = range(ROUNDS if len(fit) > 1 else 1)
        seconds = [[timeit(partial(run, *each), number=1) for each in fit] for _ in rounds]
    if not fit:
        return None
    least = list(map(min, zip(*seconds, strict=True)))
    work, is_checked = fit[least.index(min(least))]
    return WrittenBlock(evaluate, work, saved.outline, is_checked)
