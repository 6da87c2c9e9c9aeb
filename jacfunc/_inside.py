"""f linearized inside a transform of functorch: the only user of torch.func.vjp."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jacfunc._attention import plain_attention
from jacfunc._check import check_plain
from jacfunc._compiled import as_written
from jacfunc._faults import (
    can_be_batched,
    check_nodes,
    check_statistics,
    must_be_differentiable,
    once,
    wrong_second_derivative,
)
from jacfunc._functorch import (
    inside_derivative,
    is_differentiated,
    levels,
    newer_transforms,
    off_graph,
    run_backward,
)
from jacfunc._linearization import Linearization, Some, some_of, spread
from jacfunc._nested import watched_once
from jacfunc._orders import Pull, at_reverse_level, innermost_level, is_right_twice
from jacfunc._types import LeafFunction, Leaves
from jacfunc._walks import Graph


def linearize_inside(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate once and keep what a pullback needs, for torch to pull back through its level."""
    check_plain(primals)
    seen = _Seen(func, primals, (torch.is_grad_enabled(), levels()), inside_derivative())
    # a module's outputs are looked at below functorch, too: who keeps no graph records only
    # what leads to tensors of before the call
    looks = getattr(func, "state", None) is not None and not torch.is_grad_enabled()
    with plain_attention(), torch.enable_grad() if looks else nullcontext():
        cut = off_graph(primals) if looks else primals
        outputs, vjp, extras = _evaluated(seen, cut)
    if looks:
        outputs, extras = off_graph(outputs), off_graph(extras)

    def sweep(cotangents: Leaves, onto: slice, of: Some) -> Leaves:
        grad_mode = torch.is_grad_enabled()
        forced = seen.differentiable and not inside_derivative()
        keeps = grad_mode and seen.keeps_graph_of(cotangents)
        # without an outer derivative torch may take its faster, fused backward formulas
        with torch.set_grad_enabled(keeps or forced), as_written():
            if seen.ends is not None:
                products = seen.pulled(cotangents, onto, of)
            else:  # of all outputs
                products = vjp(spread(cotangents, outputs, of))[onto]
        if grad_mode or not forced:
            return once(products, outputs, seen.reason)
        return tuple(product.detach() for product in products)

    names = {node.__name__ for node in seen.nodes}
    depth = len(newer_transforms(0))
    return Linearization(outputs, extras, sweep, seen.batchable, names, depth)


def _evaluated(seen: _Seen, primals: Leaves) -> tuple[Leaves, Any, Leaves]:
    """Compilers know torch's own pullback alone."""
    if torch.compiler.is_compiling():
        linearized: Any = torch.func.vjp(seen.evaluated, *primals, has_aux=True)
        outputs, vjp, extras = linearized
        return outputs, vjp, extras
    outputs, extras = at_reverse_level(seen.evaluated, primals)
    return outputs, None, extras


@dataclass(slots=True)
class _Seen:
    """An evaluation inside of torch's own level, and what its graph there shows.

    Args:
        around: what tells whether it is differentiated further.
        is_derived: does something outside, beside plain autograd, differentiate it?
        ends: primals and outputs as that level sees them; None where no graph can be looked at.
        reason: why no second derivative may be taken, if that is so.
    """

    func: LeafFunction
    primals: Leaves
    around: Hashable
    is_derived: bool
    ends: tuple[Leaves, Leaves] | None = None
    nodes: set[Any] = field(default_factory=set)
    differentiated: bool = True
    batchable: bool = True
    differentiable: bool = True
    reason: str | None = None

    def evaluated(self, *inner: Tensor) -> tuple[Leaves, Leaves]:
        """Outputs and extras; what the graph shows is noted."""
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
        self.nodes, names = graph.nodes, graph.names
        self.differentiated = any(is_differentiated(out) for out in outputs)
        check_nodes(graph.nodes, self.differentiated and self.is_derived)
        if self.differentiated:
            self.reason = wrong_second_derivative(graph.nodes)
            self.differentiated = self.reason is None
        if self.differentiated and not is_right_twice(innermost_level()):
            check_statistics(names)
        self.batchable = can_be_batched(names, self.differentiated)
        self.differentiable = must_be_differentiable(names, in_functorch=True)

    def keeps_graph_of(self, cotangents: Leaves) -> bool:
        """Is what these are pulled back to differentiated further?"""
        if self.differentiated:
            return True
        if not any(seed.requires_grad or is_differentiated(seed) for seed in cotangents):
            return False
        check_nodes(self.nodes, True)
        return True

    def pulled(self, cotangents: Leaves, onto: slice, of: Some) -> Leaves:
        """Cotangents of some outputs, pulled back through these alone."""
        assert self.ends is not None
        inner, outer = self.ends
        pairs = zip(some_of(outer, of), cotangents, strict=True)
        live = [(out, seed) for out, seed in pairs if out.requires_grad]
        if not live:
            return tuple(map(torch.zeros_like, self.primals[onto]))
        targets, seeds = zip(*live, strict=True)
        products = run_backward(targets, inner[onto], seeds, torch.is_grad_enabled())
        return tuple(
            torch.zeros_like(primal) if product is None else product
            for product, primal in zip(products, self.primals[onto], strict=True)
        )
