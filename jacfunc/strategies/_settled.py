"""Calls of a function of one tensor that leave nothing to look at but the graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._assembly import (
    NEW_TENSORS,
    columns_to_blocks,
    owned,
    rows_to_blocks,
    unit_seeds,
)
from jacfunc._calls import BARE, Derivation, FlatCall
from jacfunc._faults import runs_alone, suspects
from jacfunc._linear_map import (
    EVERY,
    Anchor,
    Graph,
    Linearization,
    check_numbers,
    is_pushed_unwatched,
    map_of_graph,
    one_by_one,
    pushed_tensor,
    writable_copy,
)
from jacfunc._lock import alone
from jacfunc._log import is_heard
from jacfunc._remembered import MOST_KINDS, Recent
from jacfunc._torch import MathAttention, is_undisturbed, recording, run_as_written
from jacfunc._types import Tree
from jacfunc.strategies._evaluation import Evaluation
from jacfunc.strategies._forward import Forward
from jacfunc.strategies._looped import Looped
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._second import SecondCall
from jacfunc.strategies._strategy import Strategy, Streaming

MOST_LOOKS = 8
"""Calls of a kind that are looked at: plans are settled within a few calls, or at none."""


class SettledFunction:
    """What the calls of one derivative have settled, by the kind of their only argument.

    Of such a kind it is known that the function needs no watch and returns one tensor, and that all
    rows are swept at once, or one by one, or all columns at once. Later calls are evaluated, and
    their graph is looked at and swept: a small Jacobian takes half the time. What differs from the
    calls before, in kind, output or graph, or raises, is taken anew by the way of a first call.

    Args:
        order: two for the Hessian of a function that returns one number.
    """

    def __init__(self, derivation: Derivation, strategy: Strategy, order: int = 1) -> None:
        self._func, self._strategy, self._order = derivation.func, strategy, order
        self._at_once: tuple[type, ...] = (Reverse, Forward) if order == 1 else (Reverse,)
        self._harmless = set[tuple[frozenset[Any], bool]]()
        self._by_kind = Recent[_Kind](MOST_KINDS)
        self._looks = Recent[int](MOST_KINDS)

    def evaluation(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Evaluation | None:
        """The evaluation of a call, where calls of its kind have settled all but the numbers."""
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return None
        x = args[0]
        kind = _kind_of(x)
        settled = self._by_kind.get(kind)
        if settled is None or not _is_plain(x) or is_heard():
            return None
        if isinstance(settled.strategy, Forward):
            evaluation = self._pushed(x, settled.shape, settled.strategy.randomness)
        else:
            evaluation = self._pulled(x, settled)
        if evaluation is None:
            self._by_kind.pop(kind, None)
        return evaluation

    def look_at(self, call: FlatCall | SecondCall, evaluation: Evaluation) -> None:
        """Note whether later calls of this kind need no more than this one has shown."""
        func: Any = call.func if isinstance(call, SecondCall) else call
        has_all_rows = not (isinstance(call, SecondCall) and call.chosen is not None)
        if torch.compiler.is_compiling() or not (has_all_rows and func.maps_tensor_to_tensor):
            return
        if not _is_plain(x := call.primals[0]):
            return
        kind = _kind_of(x)
        looks = self._looks.get(kind, 0)
        if looks == MOST_LOOKS:
            return
        self._looks.put(kind, looks + 1)
        strategy = self._settled_strategy(call)
        if strategy is None:
            return
        out = evaluation.value_and_aux()[0]
        is_constant = out.dtype == x.dtype and out.numel() > 0 and not out.requires_grad
        if type(strategy) is Forward:
            is_alone = True if is_pushed_unwatched(func) else None
        else:
            is_alone = runs_alone(func, (torch.is_grad_enabled(), False, self._order))
        if is_constant and is_alone is not None and (self._order == 1 or out.numel() == 1):
            self._by_kind.put(kind, _Kind(out.shape, is_alone, strategy))

    def _settled_strategy(self, call: FlatCall | SecondCall) -> Reverse | Forward | Looped | None:
        """What takes all later calls of this kind; None if it is not known, or takes chunks."""
        chosen: Strategy | None = self._strategy
        if isinstance(chosen, Streaming):
            chosen = chosen.settled_for(call.call_kind)
        if isinstance(chosen, Looped):
            return chosen if chosen == Looped("rows") else None
        if isinstance(chosen, Reverse | Forward) and type(chosen) in self._at_once:
            return chosen if chosen.chunk_size is None else None
        return None

    def _pushed(self, x: Tensor, shape: torch.Size, randomness: str) -> Evaluation | None:
        """An evaluation by columns; None where the output is of another kind, or it is refused."""
        try:
            (tangents,) = unit_seeds((x,), 0, x.numel())
            out, columns = pushed_tensor(self._func, x, tangents, randomness)
            check_numbers((columns,))
        except Exception:  # the way of a first call tells what it is about
            return None
        leads_out = out.requires_grad or columns.requires_grad  # to what somebody differentiates by
        if leads_out or out.shape != shape or out.dtype != x.dtype:
            return None
        blocks = columns_to_blocks(owned((columns,)), (out,), (x,))
        return Evaluation(BARE, blocks, lambda: ((out,), ()), NEW_TENSORS)

    def _pulled(self, x: Tensor, settled: _Kind) -> Evaluation | None:
        """An evaluation by rows; None where the output, or the graph, is of another kind."""
        try:
            at = self._linearized(x, settled.shape, settled.is_alone)
        except RuntimeError:  # torch's; the way of a first call tells what it is about
            return None
        try:
            return at and self._evaluated(at, x, isinstance(settled.strategy, Looped))
        except Exception:  # a backward pass of the user's may raise anything
            return None

    def _linearized(self, x: Tensor, shape: torch.Size, is_alone: bool) -> _AtPoint | None:
        """The function at a point; None where the output, or the graph, is of another kind."""
        with recording(), MathAttention():
            anchor = x.detach().requires_grad_()
            copy = writable_copy(anchor)
            starts = {copy.grad_fn}  # before func, which may write into its argument
            target = Anchor.at(anchor) if self._order == 1 else Anchor.behind(copy)
            if is_alone:
                with alone():
                    out = run_as_written(self._func, copy)
            else:
                out = run_as_written(self._func, copy)
        if type(out) is not Tensor or out.shape != shape or out.dtype != x.dtype:
            return None
        graph = Graph.back_to(starts, (out,))
        if graph.leads_out and torch.is_grad_enabled():  # somebody may differentiate the Jacobian
            return None
        is_second = self._order == 2
        if is_second and suspects(graph.nodes):
            return None
        linear = map_of_graph((out,), (), (target,), graph, differentiated=is_second)
        return _AtPoint(linear, anchor, starts, graph)

    def _evaluated(self, at: _AtPoint, x: Tensor, is_looped: bool) -> Evaluation | None:
        outputs, linear = at.linear.outputs, at.linear
        if self._order == 2:
            second = self._gradient(at)
            if second is None:
                return None
            linear = second
        blocks = ((_only_block(linear, x, is_looped),),)
        return Evaluation(BARE, blocks, lambda: (outputs, ()), NEW_TENSORS)

    def _gradient(self, at: _AtPoint) -> Linearization | None:
        """The gradient at a point, linearized; None where the tables of faults say more of it."""
        (out,) = at.linear.outputs
        with recording(), MathAttention():
            (row,) = at.linear.pull((torch.ones_like(out),))
            row = row.view(out.shape + row.shape) if out.dim() else row
        kinds = frozenset(at.graph.nodes), at.graph.leads_out
        if kinds not in self._harmless:
            graph = Graph.back_to(at.starts, (row,))
            if suspects(graph.nodes) or graph.leads_out != at.graph.leads_out:
                return None
            self._harmless.add(kinds)
        return map_of_graph((row,), (), (Anchor.at(at.anchor),), at.graph, differentiated=False)


class _Kind(NamedTuple):
    """What calls of a kind have settled.

    Args:
        shape: of the output.
        is_alone: must the function run alone, for a module?
        strategy: sweeps all rows at once, or one by one, or all columns at once.
    """

    shape: torch.Size
    is_alone: bool
    strategy: Reverse | Forward | Looped


class _AtPoint(NamedTuple):
    """A function of one tensor at a point, whose graph is kept.

    Args:
        linear: the map of cotangents.
        anchor: the point, from which the graph leads to the output.
        starts: the nodes at which the graph begins.
        graph: what lies behind the output.
    """

    linear: Linearization
    anchor: Tensor
    starts: set[Any]
    graph: Graph


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
    (row,) = linear.last(EVERY, EVERY)((torch.ones_like(out),))
    return row.clone(memory_format=torch.contiguous_format).view(out.shape + x.shape)


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, torch.is_grad_enabled()


def _is_plain(x: Tensor) -> bool:
    """Is it a constant of numbers, and is nobody but us looking at what torch does?"""
    is_constant = not (x.requires_grad or x.is_inference())
    return (
        is_constant
        and x.layout is torch.strided
        and is_undisturbed()
        and not torch.is_inference_mode_enabled()
    )
