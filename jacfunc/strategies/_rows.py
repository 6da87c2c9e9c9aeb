"""All rows of a function of one tensor, of which nothing is left to learn but the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._assembly import owned, rows_to_blocks, unit_seeds
from jacfunc._faults import suspects
from jacfunc._linear_map import (
    EVERY,
    Anchor,
    Graph,
    Linearization,
    map_of_graph,
    one_by_one,
    writable_copy,
)
from jacfunc._lock import alone
from jacfunc._torch import MathAttention, recording, run_as_written
from jacfunc._traces import FEWEST_CALLS, MOST_MISSES
from jacfunc.strategies._written import WrittenRows, written_rows


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

    def block(self, is_looped: bool) -> Tensor:
        """The block of the output, from a sweep of its graph."""
        graph = Graph.back_to({*self.starts}, (self.out,))
        linear = map_of_graph((self.out,), (), (self.target,), graph, differentiated=False)
        return _only_block(linear, self.anchor, is_looped)


class SettledRows:
    """The rows of calls of one kind: all at once or one by one, or those of the Hessian.

    The function is evaluated once a call, but where rows are written down, and where they do not
    hold: then it is evaluated anew, as nobody knows what hooks on what is saved have changed in it.

    Args:
        func: the function.
        order: two for the Hessian of a function that returns one number.
        shape: of the output.
        is_alone: must the function run alone, for a module?
        is_looped: are rows swept one by one?
        is_free: may they be swept at once as well, where that is faster?
    """

    def __init__(
        self,
        func: Callable[[Tensor], Any],
        order: int,
        shape: torch.Size,
        is_alone: bool,
        is_looped: bool,
        is_free: bool,
    ) -> None:
        self._func, self._is_second, self._shape = func, order == 2, shape
        self._is_alone, self._is_looped, self._is_free = is_alone, is_looped, is_free
        self._harmless = set[tuple[frozenset[Any], bool]]()
        self._calls = 0
        self._written: WrittenRows | None = None

    def at(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and its block; None where the output, or the graph, is of another kind.

        Raises:
            RuntimeError: if the function does.
        """
        written = self._written
        if written is not None:
            if (known := written.replayed(x)) is not None:
                return known
            if written.misses >= MOST_MISSES:
                self._written = None
        at = self._evaluated(x)
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
            ways = (False, True) if self._is_free else (self._is_looped,)
            self._written = written_rows(self._evaluated, x, block, ways)
        return out, block

    def _evaluated(self, x: Tensor) -> AtPoint:
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
