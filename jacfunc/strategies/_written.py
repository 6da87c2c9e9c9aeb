"""Rows or columns of a function of one tensor, written down as operators on what autograd saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from timeit import timeit
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jacfunc._errors import Nameless
from jacfunc._log import note
from jacfunc._rounding import agree
from jacfunc._torch import Graphs, RandomState, holds_nan
from jacfunc._traces import (
    MOST_BYTES,
    MOST_KEPT,
    MOST_MISSES,
    Sources,
    WrittenWork,
    are_same,
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


Evaluate = Callable[[Tensor], SweepablePoint]


class WrittenBlock:
    """Sweeps of all rows, or columns, as a straight program, which reads what autograd has saved.

    It holds for evaluations whose graphs have the same outline, and no hooks. So a function may
    branch, write, and close over what changes from call to call: what leads elsewhere is swept.

    Args:
        evaluate: evaluates the function at a point.
        work: the block, written down.
        outline: of the graphs for which it holds.
        is_checked: does it not hold where there is a nan? Of columns nobody knows what made one.
    """

    def __init__(
        self, evaluate: Evaluate, work: WrittenWork, outline: Any, is_checked: bool
    ) -> None:
        self._evaluate, self._outline, self._is_checked = evaluate, outline, is_checked
        self._work: WrittenWork | None = work
        self._misses = 0

    def replayed(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block; None where it does not hold, or too often in a row did not."""
        work, result = self._work, None
        if work is None:
            return None
        saved = _Saved.at(x, self._evaluate)
        if saved is not None and saved.is_whole and saved.outline == self._outline:
            with torch.set_grad_enabled(False):
                result = work.result(saved.leaves)
            if result is not None and self._is_checked and holds_nan(result[0]):
                result = None
        self._misses = 0 if result is not None else self._misses + 1
        if self._misses >= MOST_MISSES:
            self._work = None
        return None if saved is None or result is None else (saved.evaluated.out, result[0])


class _Saved(NamedTuple):
    """An evaluation, what was saved for its backward pass, and the outline of its graph."""

    evaluated: SweepablePoint
    sources: Sources
    outline: Any

    @classmethod
    def at(cls, x: Tensor, evaluate: Evaluate) -> Self | None:
        """One at this point; None if it saves too much, or sets hooks, which may do anything."""
        sources, hooks, first = Sources(moments=[]), RemovableHandle.next_id, Graphs.num_nodes()
        try:
            with sources.saving():
                at = evaluate(x)
        except Nameless:
            return None
        if type(at.out) is not Tensor or RemovableHandle.next_id != hooks:
            return None
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

    def written(self, sweeps: Sweeps) -> WrittenWork | None:
        """The sweeps of the block, written down; None if they can't be."""

        def swept() -> Leaves:
            return (self.evaluated.block(sweeps),)

        try:
            return WrittenWork(swept, self.leaves, MOST_KEPT)
        except Exception as error:  # calls are swept as before
            note("%s of a settled kind of call are not written down: %s", sweeps.over, error)
            return None


def written_block(
    begun: Callable[[], Evaluate],
    x: Tensor,
    expected: Tensor,
    ways: Iterable[Sweeps],
    is_pushed: bool = False,
) -> WrittenBlock | None:
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
    evaluate: Evaluate, x: Tensor, expected: Tensor, ways: list[Sweeps], is_pushed: bool
) -> WrittenBlock | None:
    first = _Saved.at(x, evaluate)
    if first is None or first.outline is None:
        return None
    works = [(work, way) for way in ways if (work := first.written(way)) is not None]
    second = _Saved.at(x, evaluate)
    if second is None or not second.is_whole or second.outline != first.outline:
        return None
    if not all(map(are_same, first.leaves, second.leaves)):
        return None
    fit: list[tuple[WrittenWork, bool]] = []

    def run(work: WrittenWork, is_checked: bool) -> None:
        result = work.result(second.leaves)
        if result is not None and is_checked:
            holds_nan(result[0])

    with torch.set_grad_enabled(False):
        for work, way in works:
            work.hold_for(second.leaves)
            result = work.result(second.leaves)
            if result is not None and agree(result, (expected,)):
                fit.append((work, is_pushed or way.are_pushes))
        rounds = range(ROUNDS if len(fit) > 1 else 1)
        seconds = [[timeit(partial(run, *each), number=1) for each in fit] for _ in rounds]
    if not fit:
        return None
    least = list(map(min, zip(*seconds, strict=True)))
    work, is_checked = fit[least.index(min(least))]
    return WrittenBlock(evaluate, work, first.outline, is_checked)
