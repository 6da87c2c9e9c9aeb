"""The Jacobian of a function as a function itself, of which second derivatives are taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import check_fallback
from jacfunc._faults import check_nodes, handled, suspects
from jacfunc._linear_map.graph import Anchor, map_of_graph
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._linear_map.seeded import one_by_one
from jacfunc._linear_map.walks import Graph
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._remembered import CallKind, Remembered
from jacfunc._torch import sweep_batch, untracked
from jacfunc._types import LeafFunction, Leaves


class Derivative(ABC):
    """``x ↦ J(x)`` for a function of leaves, as a function of leaves.

    Its outputs are made of the rows of J; outputs and extras of the function are its extras. On a
    plain graph the function is evaluated once for both derivatives.

    Args:
        func: the function.
    """

    def __init__(self, func: LeafFunction) -> None:
        self.func = func
        self.num_values = 0
        """How many outputs the function had at the last evaluation; they are the first extras."""

    @abstractmethod
    def rows(self, operator: JacobianOperator) -> Leaves:
        """The outputs, from the function's Jacobian."""

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        return self.without_values(self._of(JacobianOperator(self.func, primals)))

    @property
    def state(self) -> Any:
        """The state of the module that is called; None of a function."""
        return getattr(self.func, "state", None)

    def recorded(self, *copies: Tensor) -> tuple[Leaves, Leaves]:
        """``((*values, *rows), extras)``, at copies that lie inside of a plain graph already."""
        with untracked():
            targets, starts = list(map(Anchor.behind, copies)), {copy.grad_fn for copy in copies}
        outputs, extras = self.func(*copies)
        with untracked():
            self._first = graph = Graph.back_to(starts, (*outputs, *extras))
        check_nodes(graph.nodes, True)
        as_evaluated = None if self.state is None else self.state.as_evaluated()
        first = map_of_graph(outputs, extras, targets, graph, True, as_evaluated)
        return self._of(JacobianOperator(self.func, copies, first))

    def graph_behind(self, starts: set[Any], tensors: Leaves) -> Graph:
        """What is behind the rows, as they were recorded.

        To walk there takes a tenth of a small second derivative. Where nothing was to be told of it
        in an earlier call of this kind, it is the graph behind the function's own outputs.
        """
        first = self._first
        _, kind, version = getattr(self.func, "exact_kind", None) or (None, None, None)
        key = kind, frozenset(first.nodes), first.leads_out
        if version is not None and _told_nothing().get(version, key):
            return first
        graph = Graph.back_to(starts, tensors)
        is_harmless = not suspects(graph.nodes | first.nodes)
        if version is not None and is_harmless and graph.leads_out == first.leads_out:
            _told_nothing().put(version, key, True)
        return graph

    def without_values(self, evaluated: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves]:
        """``(rows, (*values, *extras))``."""
        (leaves, extras), count = evaluated, self.num_values
        return leaves[count:], (*leaves[:count], *extras)

    def _of(self, operator: JacobianOperator) -> tuple[Leaves, Leaves]:
        rows = self.rows(operator)
        outputs, extras = operator.image()
        self.num_values = len(outputs)
        return (*outputs, *rows), extras


@cache
def _told_nothing() -> Remembered[bool]:
    """Functions of which the tables of faults name no node of the second derivative."""
    return Remembered()


class _Push:
    """``J v`` at a point as a function of the point; its extras are all that ``func`` returned.

    Args:
        seeds: the tangents v.
        of: the number of the output whose tangent is returned.
    """

    makes_copies = True
    """Does it copy the point itself, before ``func`` may write into it?"""
    state = None

    def __init__(self, func: LeafFunction, seeds: Leaves, of: int) -> None:
        self._func, self._seeds, self._of = func, seeds, of
        self.count = 0

    @property
    def exact_kind(self) -> CallKind | None:
        """The exact kind of the function's call, as one that is pushed; None for a module."""
        kind: CallKind | None = getattr(self._func, "exact_kind", None)
        is_of_module = getattr(self._func, "state", None) is not None
        return None if kind is None or is_of_module else kind.among("pushed", self._of)

    @property
    def functions(self) -> list[Any]:
        """The functions that run when it is called, as far as they are known."""
        return list(getattr(self._func, "functions", [self._func]))

    @property
    def may_share_module(self) -> bool:
        """May the function call a module, which another thread may be lending?"""
        return bool(getattr(self._func, "may_share_module", False))

    def __call__(self, *point: Tensor) -> tuple[Leaves, Leaves]:
        inner = JacobianOperator(self._func, point)
        products = inner.pushforward(self._seeds)
        outputs, extras = inner.image()
        self.count = len(outputs)
        return (products[self._of],), (*outputs, *extras)


def pull_of_push(
    func: LeafFunction, primals: Leaves, seeds: Leaves, of: int
) -> tuple[Leaves, tuple[Leaves, Leaves]]:
    """The gradient of ``⟨u, J v⟩``, pulled back through a pushforward; and what ``func`` returned.

    Args:
        seeds: tangents v, and the cotangent u of the output with the number ``of``; of ones, if it
            is left out.
    """
    pushed = _Push(func, seeds[: len(primals)], of)
    operator = JacobianOperator(pushed, primals)
    cotangent = seeds[len(primals) :] or (torch.ones_like(operator.outputs[0]),)
    gradient = operator.pullback(cotangent)
    _, rest = operator.image()
    return gradient, (rest[: pushed.count], rest[pushed.count :])


def pull_of_pushes(
    func: LeafFunction, operator: JacobianOperator, seeds: Leaves, of: int
) -> Leaves:
    """The gradients ``[K, *in]`` of :func:`pull_of_push` for K tangents and K cotangents.

    Args:
        operator: at the same point; it has drawn the random numbers that are drawn again.
    """

    def pulled(seeds: Leaves) -> tuple[Leaves, Leaves]:
        return pull_of_push(func, operator.primals, seeds, of)[0], ()

    try:
        with alone():
            operator.rewind_generators()
            return sweep_batch(pulled, seeds)[0]
    except Exception as error:  # torch has no type for what it can't do
        check_fallback(error)
        handled(error)
        note("pushforwards could not be pulled back at once, rows go one by one: %s", error)

    def alone_pulled(seeds: Leaves) -> Leaves:
        with alone():
            operator.rewind_generators()
            return pulled(seeds)[0]

    # not where the error is known: its traceback holds what was swept at once
    return one_by_one(alone_pulled, seeds)
