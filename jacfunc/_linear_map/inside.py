"""A function linearized inside a transform, by torch.func.vjp, which is called here alone."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_plain
from jacfunc._faults import (
    LOST_OUTSIDE,
    can_be_batched,
    check_nodes,
    check_statistics,
    must_be_differentiable,
    suspects,
    watched_once,
    wrong_second_derivative,
)
from jacfunc._linear_map.linearization import LeafNumbers, Linearization, chosen_leaves, spread
from jacfunc._linear_map.seeded import once
from jacfunc._linear_map.walks import Graph
from jacfunc._torch import (
    MathAttention,
    Pull,
    as_written,
    at_reverse_level,
    innermost_level,
    inside_derivative,
    is_differentiated,
    is_right_twice,
    levels,
    newer_transforms,
    off_graph,
    run_backward,
)
from jacfunc._types import LeafFunction, Leaves


def linearize_inside(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate a function once, in a level of torch.func, and keep what a pullback needs."""
    check_plain(primals)
    inner = _InnerEvaluation(
        func, primals, (torch.is_grad_enabled(), levels()), inside_derivative()
    )
    # a module's state looks for the plain graph of its outputs, below all transforms: where the
    # caller keeps none, one is recorded that leads to tensors of before the call alone
    records = getattr(func, "state", None) is not None and not torch.is_grad_enabled()
    with MathAttention(), torch.enable_grad() if records else nullcontext():
        own = off_graph(primals) if records else primals
        outputs, vjp, extras = _evaluated(inner, own)
    if records:
        outputs, extras = off_graph(outputs), off_graph(extras)

    def swept(onto: slice, of: LeafNumbers, cotangents: Leaves) -> Leaves:
        grad_mode = torch.is_grad_enabled()
        forced = inner.differentiable and not inside_derivative()
        keeps = grad_mode and inner.keeps_graph_of(cotangents)
        # where nobody differentiates further, torch may take its faster, fused backward formulas
        with torch.set_grad_enabled(keeps or forced), as_written():
            if inner.ends is not None:
                products = inner.pull(cotangents, onto, of)
            else:  # a compiler knows torch's own pullback alone, which takes all outputs
                products = vjp(spread(cotangents, outputs, of))[onto]
        if grad_mode or not forced:
            return once(products, outputs, inner.reason)
        return tuple(product.detach() for product in products)

    names = {node.__name__ for node in inner.nodes}
    depth = len(newer_transforms(0))
    sweep = partial(partial, swept)  # takes onto what, and of what: all but the cotangents
    return Linearization(outputs, extras, sweep, inner.batchable, names, depth)


def _evaluated(inner: _InnerEvaluation, primals: Leaves) -> tuple[Leaves, Any, Leaves]:
    """Outputs, torch's own pullback for a compiler, which knows no other one, and extras."""
    if torch.compiler.is_compiling():
        linearized: Any = torch.func.vjp(inner.evaluate, *primals, has_aux=True)
        outputs, vjp, extras = linearized
        return outputs, vjp, extras
    outputs, extras = at_reverse_level(inner.evaluate, primals)
    return outputs, None, extras


@dataclass(slots=True)
class _InnerEvaluation:
    """An evaluation inside of a level of torch.func, and what its graph at that level shows.

    Args:
        around: equal for evaluations that are differentiated further in the same way.
        is_derived: does something outside, beside plain autograd, differentiate it?
        ends: primals and outputs as the level sees them; None where no graph can be looked at.
        kinds: those of the nodes in the graph.
        nodes: those among them that may be wrong.
        differentiated: may products be differentiated further?
        batchable: is a pullback right under vmap?
        differentiable: must its backward formulas be the differentiable ones?
        reason: why no second derivative may be taken, if that is so.
    """

    func: LeafFunction
    primals: Leaves
    around: Hashable
    is_derived: bool
    ends: tuple[Leaves, Leaves] | None = None
    kinds: set[Any] = field(default_factory=set)
    nodes: set[Any] = field(default_factory=set)
    differentiated: bool = True
    batchable: bool = True
    differentiable: bool = True
    reason: str | None = None

    def evaluate(self, *inner: Tensor) -> tuple[Leaves, Leaves]:
        """Outputs and extras of the function; the graph between is looked at."""
        copies = [primal.clone() for primal in inner]
        if torch.compiler.is_compiling():
            return self.func(*copies)
        starts = {copy.grad_fn for copy in copies}
        pull = Pull(innermost_level(), self.around)
        outputs, extras = watched_once(self.func, copies, self.primals, pull)
        self.ends = inner, outputs
        self._look(outputs, Graph.back_to(starts, outputs))
        return outputs, extras

    def _look(self, outputs: Leaves, graph: Graph) -> None:
        self.kinds, self.nodes = graph.nodes, (nodes := suspects(graph.nodes))
        names = {node.__name__ for node in nodes}
        is_lost = not names.isdisjoint(LOST_OUTSIDE)
        self.differentiated = is_lost or any(map(is_differentiated, outputs))
        check_nodes(nodes, self.differentiated and self.is_derived)
        if self.differentiated:
            self.reason = wrong_second_derivative(nodes)
            self.differentiated = self.reason is None
        if self.differentiated and not is_right_twice(innermost_level()):
            check_statistics(names)
        self.batchable = can_be_batched(names, self.differentiated)
        self.differentiable = must_be_differentiable(names, in_functorch=True)

    def keeps_graph_of(self, cotangents: Leaves) -> bool:
        """May the products of these cotangents be differentiated further?"""
        if self.differentiated:
            return True
        if not any(seed.requires_grad or is_differentiated(seed) for seed in cotangents):
            return False
        check_nodes(self.nodes, True)
        return True

    def pull(self, cotangents: Leaves, onto: slice, of: LeafNumbers) -> Leaves:
        """Products of cotangents of some outputs, pulled back through these outputs alone."""
        assert self.ends is not None
        inner, outer = self.ends
        pairs = zip(chosen_leaves(outer, of), cotangents, strict=True)
        active = [(out, seed) for out, seed in pairs if out.requires_grad]
        if not active:
            return tuple(map(torch.zeros_like, self.primals[onto]))
        targets, seeds = zip(*active, strict=True)
        grad_mode = torch.is_grad_enabled()
        products = run_backward(targets, inner[onto], seeds, grad_mode, kinds=self.kinds)
        return tuple(
            torch.zeros_like(primal) if product is None else product
            for product, primal in zip(products, self.primals[onto], strict=True)
        )
