"""All rows or columns of a function of one tensor, of which only the numbers are left to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._assembly import columns_to_blocks, owned, rows_to_blocks, unit_seeds
from jacfunc._faults import suspects
from jacfunc._linear_map import (
    EVERY,
    Anchor,
    Graph,
    Linearization,
    check_numbers,
    map_of_graph,
    one_by_one,
    pushed_tensor,
    writable_copy,
)
from jacfunc._lock import alone
from jacfunc._torch import MathAttention, RandomState, recording, run_as_written
from jacfunc._traces import FEWEST_CALLS, MOST_MISSES
from jacfunc.strategies._strategy import Sweeps
from jacfunc.strategies._written import Evaluate, WrittenBlock, written_block


class AtPoint(NamedTuple):
    """What a function of one tensor returned at a point, and where its graph begins.

    Args:
        out: what it returned.
        anchor: the point, from which the graph leads to the output.
        target: what cotangents are pulled back to: the point, or the copy that the function got.
        starts: the nodes at which the graph begins, with their numbers.
    """

    out: Any
    anchor: Tensor
    target: Anchor
    starts: dict[Any, int]

    def block(self, sweeps: Sweeps) -> Tensor:
        """The block of the output, from sweeps of its graph: columns by the pullback of that."""
        graph = Graph.back_to({*self.starts}, (self.out,))
        linear = map_of_graph((self.out,), (), (self.target,), graph, differentiated=False)
        if not sweeps.are_pushes:
            return _only_block(linear, self.anchor, not sweeps.is_vmapped)
        transpose: Any = linear.transpose  # unchecked: the block is compared with that of a call
        columns = transpose(False).pull_batch(unit_seeds((self.anchor,), 0, self.anchor.numel()))
        return columns_to_blocks(owned(columns), (self.out,), (self.anchor,))[0][0]


class SettledRows:
    """The rows of calls of one kind: all at once or one by one, or those of the Hessian.

    The function is evaluated once a call, whether what is written down holds or not.

    Args:
        func: the function.
        order: two for the Hessian of a function that returns one number.
        shape: of the output.
        is_alone: must the function run alone, for a module?
        is_looped: are rows swept one by one?
        ways: how they may be swept once they are written down.
    """

    def __init__(
        self,
        func: Callable[[Tensor], Any],
        order: int,
        shape: torch.Size,
        is_alone: bool,
        is_looped: bool,
        ways: Iterable[Sweeps],
    ) -> None:
        self._func, self._is_second, self._shape = func, order == 2, shape
        self._is_alone, self._is_looped, self._ways = is_alone, is_looped, ways
        self._harmless = set[tuple[frozenset[Any], bool]]()
        self._calls = 0
        self._written: WrittenBlock[AtPoint] | None = None

    def at(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block; None where the output, or the graph, is of another kind.

        Raises:
            RuntimeError: if the function does.
        """
        written = self._written
        known = None if written is None else written.at(x)
        if written is not None and not written.is_kept:
            self._written = None
        if known is not None:
            saved, block = known  # a sweep reads what is saved, so that must not go before
            if block is not None:
                return saved.evaluated.out, block
        at = saved.evaluated if known is not None else self.evaluated(x)
        try:
            block = self._swept(at, x)
        except Exception:  # a backward pass of the user's may raise anything
            return None
        if block is None:
            return None
        self._calls += 1
        out = at.out.detach()
        del at  # its graph need not stay while another one is made
        if self._calls == FEWEST_CALLS and not self._is_second:
            self._written = written_block(lambda: self.evaluated, x, block, self._ways)
        return out, block

    def evaluated(self, x: Tensor) -> AtPoint:
        """The function at a copy of a point, while autograd records."""
        with recording(), MathAttention():
            anchor = x.detach().requires_grad_()
            copy = writable_copy(anchor)
            starts = {copy.grad_fn: 0}  # before func, which may write into its argument
            target = Anchor.behind(copy) if self._is_second else Anchor.at(anchor)
            if self._is_alone:
                with alone():
                    out = run_as_written(self._func, copy)
            else:
                out = run_as_written(self._func, copy)
        return AtPoint(out, anchor, target, starts)

    def _swept(self, at: AtPoint, x: Tensor) -> Tensor | None:
        """The block at a point; None where the output, or the graph, is of another kind."""
        out = at.out
        if type(out) is not Tensor or out.shape != self._shape or out.dtype != x.dtype:
            return None
        graph = Graph.back_to({*at.starts}, (out,))
        if graph.leads_out and torch.is_grad_enabled():  # somebody may differentiate the Jacobian
            return None
        if self._is_second and suspects(graph.nodes):
            return None
        linear = map_of_graph((out,), (), (at.target,), graph, differentiated=self._is_second)
        if self._is_second and not self._is_harmless(at, graph, row := _gradient(linear)):
            return None
        if self._is_second:
            linear = map_of_graph((row,), (), (Anchor.at(at.anchor),), graph, differentiated=False)
        return _only_block(linear, x, self._is_looped)

    def _is_harmless(self, at: AtPoint, graph: Graph, row: Tensor) -> bool:
        """Do the tables of faults say nothing of the graph behind a gradient?"""
        kinds = frozenset(graph.nodes), graph.leads_out
        if kinds in self._harmless:
            return True
        behind = Graph.back_to({*at.starts}, (row,))
        if suspects(behind.nodes) or behind.leads_out != graph.leads_out:
            return False
        self._harmless.add(kinds)
        return True


class SettledColumns:
    """The columns of calls of one kind, all at once: pushed, until they are written down.

    What is written down is evaluated once, as for rows: these or columns are made of what autograd
    has saved. Where that does not hold, tangents are pushed in another evaluation, which draws the
    same numbers. A way that Python's random numbers choose is drawn twice: few misses end this.

    Args:
        func: the function, which needs no watch where tangents are pushed.
        shape: of the output.
        randomness: of the columns.
        begun: returns what evaluates the function at a point, for a graph that is swept.
        ways: how the graph may be swept; none if nothing may be written down.
        written: what is written down of columns that come in chunks, which are not pushed here.
    """

    def __init__(
        self,
        func: Callable[[Tensor], Any],
        shape: torch.Size,
        randomness: str,
        begun: Callable[[Tensor], Evaluate[AtPoint]],
        ways: Iterable[Sweeps],
        written: WrittenBlock[AtPoint] | None = None,
    ) -> None:
        self._func, self._shape, self._randomness = func, shape, randomness
        self._begun, self._ways = begun, ways
        self._calls = self._misses = 0
        self._written, self._is_in_chunks = written, written is not None

    def at(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block; None where the output is of another kind, or it is refused.

        Raises:
            RuntimeError: if the function does.
        """
        if self._written is not None and (known := self._replayed(self._written, x)) is not None:
            return known
        if self._is_in_chunks:
            return None
        try:
            (tangents,) = unit_seeds((x,), 0, x.numel())
            out, columns = pushed_tensor(self._func, x, tangents, self._randomness)
            check_numbers((columns,))
        except Exception:  # the way of a first call tells what it is about
            return None
        leads_out = out.requires_grad or columns.requires_grad  # to what somebody differentiates by
        if leads_out or out.shape != self._shape or out.dtype != x.dtype:
            return None
        block = columns_to_blocks(owned((columns,)), (out,), (x,))[0][0]
        self._calls += 1
        if self._calls == FEWEST_CALLS:
            begun = partial(self._begun, x)
            self._written = written_block(begun, x, block, self._ways, is_pushed=True)
        return out, block

    def _replayed(self, written: WrittenBlock[AtPoint], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block by what is written down; None where it does not hold."""
        random_state = RandomState((x,))
        saved, block = written.at(x) or (None, None)
        if saved is not None and block is not None:
            return saved.evaluated.out, block
        random_state.repeat()
        self._misses += 1
        if self._misses >= MOST_MISSES:
            self._written = None
        return None


def _gradient(linear: Linearization) -> Tensor:
    """The gradient of the only output, with its graph."""
    (out,) = linear.outputs
    with recording(), MathAttention():
        (row,) = linear.pull((torch.ones_like(out),))
        return row.view(out.shape + row.shape) if out.dim() else row


def _only_block(linear: Linearization, x: Tensor, is_looped: bool) -> Tensor:
    """The block ``[*out, *in]`` of the only output; what the user's tensors hold is copied."""
    outputs = linear.outputs
    (out,) = outputs
    if out.numel() > 1:
        seeds = unit_seeds(outputs, 0, out.numel())
        if is_looped:
            rows = one_by_one(linear.sweep(EVERY, EVERY), seeds)
        else:
            rows = owned(linear.pull_batch(seeds))
        return rows_to_blocks(rows, outputs, (x,))[0][0]
    assert linear.last is not None
    one = torch.ones(out.shape, dtype=out.dtype, device=out.device)
    (row,) = linear.last(EVERY, EVERY)((one,))
    return row.clone(memory_format=torch.contiguous_format).view(out.shape + x.shape)
