"""Rows of a function of one tensor, written down: operators on what autograd has saved."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jacfunc._log import note
from jacfunc._rounding import agree
from jacfunc._torch import Graphs, RandomState
from jacfunc._traces import MOST_BYTES, Sources, WrittenWork, fingerprint, outline
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


Evaluate = Callable[[Tensor], SweepablePoint]


class WrittenRows:
    """A sweep of all rows as a straight program, which reads what autograd has saved.

    It holds for evaluations whose graphs have the same outline, and no hooks. So a function may
    branch, write, and close over what changes from call to call: what leads elsewhere is swept.

    Args:
        evaluate: evaluates the function at a point.
        work: the rows, written down.
        outline: of the graphs for which they hold.
    """

    def __init__(self, evaluate: Evaluate, work: WrittenWork, outline: Any) -> None:
        self._evaluate, self._work, self._outline = evaluate, work, outline
        self.misses = 0
        """So often in a row it did not hold."""

    def replayed(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block; None where it does not hold."""
        result, saved = None, _Saved.at(x, self._evaluate)
        is_like = saved is not None and saved.outline == self._outline
        if saved is not None and is_like and saved.sources.are_as_saved:
            with torch.set_grad_enabled(False):
                result = self._work.result(saved.leaves)
        self.misses = 0 if result is not None else self.misses + 1
        return None if saved is None or result is None else (saved.evaluated.out, result[0])


class _Saved(NamedTuple):
    """An evaluation, what was saved for its backward pass, and the outline of its graph."""

    evaluated: SweepablePoint
    sources: Sources
    outline: Any

    @classmethod
    def at(cls, x: Tensor, evaluate: Evaluate) -> Self | None:
        """One at this point; None if it sets hooks, which may do anything."""
        sources, hooks, first = Sources(moments=[]), RemovableHandle.next_id, Graphs.num_nodes()
        with sources.saving():
            at = evaluate(x)
        if type(at.out) is not Tensor or RemovableHandle.next_id != hooks:
            return None
        told, moments = sources.saved, sources.moments
        return cls(at, sources, outline(at.out, at.starts, first, told, moments))

    @property
    def leaves(self) -> Leaves:
        """All that rows are made of."""
        return *self.sources.saved, self.evaluated.out

    @property
    def fingerprint(self) -> Any:
        """What is equal for evaluations that are equal, without their tensors."""
        return self.outline, list(map(fingerprint, self.leaves))

    def written(self, is_looped: bool) -> WrittenWork:
        """The sweep of all rows, written down."""

        def swept() -> Leaves:
            return (self.evaluated.block(is_looped),)

        return WrittenWork(swept, self.leaves)


def written_rows(
    evaluate: Evaluate, x: Tensor, expected: Tensor, ways: tuple[bool, ...]
) -> WrittenRows | None:
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
    evaluate: Evaluate, x: Tensor, expected: Tensor, ways: tuple[bool, ...]
) -> WrittenRows | None:
    saved = _Saved.at(x, evaluate)
    if saved is None or saved.outline is None:
        return None
    works, known = list(map(saved.written, ways)), saved.fingerprint
    del saved  # before there is another one
    saved = _Saved.at(x, evaluate)
    if saved is None or not saved.sources.are_as_saved or saved.fingerprint != known:
        return None
    timed: list[float] = []
    with torch.set_grad_enabled(False):
        for work in works:
            work.hold_for(saved.leaves)
            result = work.result(saved.leaves)
            if result is None or not agree(result, (expected,)):
                return None
            del result  # before there is another one
            again = partial(work.result, saved.leaves)
            timed.append(min(timeit.repeat(again, number=1, repeat=3)))
    return WrittenRows(evaluate, works[timed.index(min(timed))], saved.outline)
