"""Rows of a function of one tensor, written down: operators on what autograd has saved."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jacfunc._errors import Nameless
from jacfunc._log import note
from jacfunc._rounding import agree
from jacfunc._torch import Graphs, RandomState
from jacfunc._traces import MOST_BYTES, MOST_KEPT, Sources, WrittenWork, are_same, outline
from jacfunc._types import Leaves

MOST_ROWS = 16
"""More are not written down one by one: programs of thousands of operators are slow to make."""


class SweepablePoint(Protocol):
    """A function evaluated at a point."""

    @property
    def out(self) -> Any: ...

    @property
    def starts(self) -> dict[Any, int]: ...

    def block(self, is_looped: bool) -> Tensor:
        """The block of the output, from a sweep of its graph."""


PointT = TypeVar("PointT", bound=SweepablePoint)
Evaluate = Callable[[Tensor], PointT]


class WrittenRows(Generic[PointT]):
    """A sweep of all rows as a straight program, which reads what autograd has saved.

    It holds for evaluations whose graphs have the same outline, and no hooks. So a function may
    branch, write, and close over what changes from call to call: what leads elsewhere is swept, and
    not evaluated anew, as a function that draws its way would then take rare ways more rarely.

    Args:
        evaluate: evaluates the function at a point.
        work: the rows, written down.
        outline: of the graphs for which they hold.
    """

    def __init__(self, evaluate: Evaluate[PointT], work: WrittenWork, outline: Any) -> None:
        self._evaluate, self._work, self._outline = evaluate, work, outline
        self.misses = 0
        """So often in a row it did not hold."""

    def at(self, x: Tensor) -> tuple[Saved[PointT], Tensor | None] | None:
        """The function at a point, and the rows; None for these where what is known does not hold.

        None for both if the evaluation can't be swept, as not all is there as it was saved.
        """
        block, saved = None, Saved.at(x, self._evaluate)
        is_whole = saved is not None and saved.is_whole
        if saved is not None and is_whole and saved.outline == self._outline:
            with torch.set_grad_enabled(False):
                (block,) = self._work.result(saved.leaves) or (None,)
        self.misses = 0 if block is not None else self.misses + 1
        return (saved, block) if saved is not None and is_whole else None


class Saved(NamedTuple, Generic[PointT]):
    """An evaluation, what was saved for its backward pass, and the outline of its graph."""

    evaluated: PointT
    sources: Sources
    outline: Any

    @classmethod
    def at(cls, x: Tensor, evaluate: Evaluate[PointT]) -> Self | None:
        """One at this point; None if it saves too much.

        It has no outline if it sets hooks, which may do anything.
        """
        sources, hooks, first = Sources(moments=[]), RemovableHandle.next_id, Graphs.num_nodes()
        try:
            with sources.saving():
                at = evaluate(x)
        except Nameless:
            return None
        if type(at.out) is not Tensor or RemovableHandle.next_id != hooks:
            return cls(at, sources, None)
        told, moments = sources.saved, sources.moments
        return cls(at, sources, outline(at.out, at.starts, first, told, moments))

    @property
    def leaves(self) -> Leaves:
        """All that rows are made of."""
        return *self.sources.saved, self.evaluated.out

    @property
    def is_whole(self) -> bool:
        """Is all there, as it was saved?"""
        return self.sources.bytes_left >= 0 and self.sources.are_as_saved

    def written(self, is_looped: bool) -> WrittenWork:
        """The sweep of all rows, written down."""

        def swept() -> Leaves:
            return (self.evaluated.block(is_looped),)

        return WrittenWork(swept, self.leaves, MOST_KEPT)


def written_rows(
    evaluate: Evaluate[PointT], x: Tensor, expected: Tensor, ways: tuple[bool, ...]
) -> WrittenRows[PointT] | None:
    """The rows at a point, written down; None if they can't be, or if it would not pay.

    Args:
        expected: the block at this point.
        ways: are rows swept one by one? If both is allowed, the faster one is found out: once it is
            written down, a batch of rows costs no more calls than a row.
    """
    is_long = True in ways and expected.numel() > MOST_ROWS * x.numel()
    if is_long or expected.nbytes > MOST_BYTES:
        return None
    random_state = RandomState((x,))
    try:
        return _written_rows(evaluate, x, expected, ways)
    except Exception as error:  # it goes on as before
        note("the rows of a settled kind of call are not written down: %s", error)
        return None
    finally:
        random_state.repeat()


def _written_rows(
    evaluate: Evaluate[PointT], x: Tensor, expected: Tensor, ways: tuple[bool, ...]
) -> WrittenRows[PointT] | None:
    first = Saved.at(x, evaluate)
    if first is None or first.outline is None:
        return None
    works = list(map(first.written, ways))
    second = Saved.at(x, evaluate)
    if second is None or not second.is_whole or second.outline != first.outline:
        return None
    if not all(map(are_same, first.leaves, second.leaves)):
        return None
    timed: list[float] = []
    with torch.set_grad_enabled(False):
        for work in works:
            work.hold_for(second.leaves)
            result = work.result(second.leaves)
            if result is None or not agree(result, (expected,)):
                return None
            again = partial(work.result, second.leaves)
            timed.append(min(timeit.repeat(again, number=1, repeat=3)))
    return WrittenRows(evaluate, works[timed.index(min(timed))], first.outline)
