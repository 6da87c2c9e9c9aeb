"""A function at a point, linearized: evaluated once, its graph kept as a map of cotangents.

Plain autograd keeps one graph and sweeps it with vmap: half the time of torch.func at small sizes,
and wider coverage. Inside another transform of functorch only torch.func.vjp can pull back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from jacfunc._arguments import are_plain, check_kept
from jacfunc._faults import PullbackRules, check_nodes, pullback_rules, watched_once
from jacfunc._linear_map.agreement import check_transpose
from jacfunc._linear_map.inside import linearize_inside
from jacfunc._linear_map.linearization import EVERY, LeafNumbers, Linearization, chosen_leaves
from jacfunc._linear_map.seeded import once
from jacfunc._linear_map.walks import Graph, LeadsOut
from jacfunc._torch import (
    MathAttention,
    Pull,
    below_transforms,
    is_outermost,
    noise_like,
    outside_transforms,
    recording,
    run_as_written,
    run_backward,
    untracked,
)
from jacfunc._types import LeafFunction, Leaves

DETACHES = "it detaches its cotangent, as a hook or an autograd.Function may do"


class Anchor(NamedTuple):
    """What a graph is differentiated by: a tensor, or the edge of the node that made one.

    Args:
        edge: where a pullback ends.
        zeros: makes the product where no path leads there.
    """

    edge: Tensor | GradientEdge
    zeros: Callable[[], Tensor]

    @classmethod
    def at(cls, tensor: Tensor) -> Anchor:
        """At a tensor, which is kept."""
        return cls(tensor, partial(torch.zeros_like, tensor, requires_grad=False))

    @classmethod
    def behind(cls, tensor: Tensor) -> Anchor:
        """At the value that a tensor has now; the tensor is not kept, and may be written into."""
        zeros = partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node = tensor.grad_fn
        # the Python object of a node of the user's own does not keep its graph
        if node is None or isinstance(node, BackwardCFunction):
            return cls(get_gradient_edge(tensor), zeros)
        return cls(GradientEdge(node, tensor.output_nr), zeros)


def differentiable_alias(primal: Tensor, grad_mode: bool) -> Tensor:
    """An alias of a primal to differentiate by, which nothing outside of this call depends on."""
    if grad_mode and primal.requires_grad:
        return primal.view_as(primal)
    own = primal.clone() if primal.is_inference() else primal.detach()
    return own.requires_grad_()


def writable_copy(anchor: Tensor) -> Tensor:
    """A clone that a function may write into; in memory each sample lies as in the anchor."""
    if anchor.is_contiguous() or 0 not in anchor.stride():
        return anchor.clone()
    # torch's own clone puts expanded dimensions, here the samples, innermost
    strides = list(anchor.stride())
    step = 1
    for dim in sorted(range(anchor.dim()), key=lambda d: (strides[d] == 0, strides[d])):
        strides[dim], step = step, step * anchor.shape[dim]
    # not a view: a write into a view would change the node that the view came from
    own = torch.empty_strided(anchor.shape, strides, dtype=anchor.dtype, device=anchor.device)
    return own.copy_(anchor)


def no_view(tensor: Tensor) -> Tensor:
    """The tensor, or for a view the same memory as a result of its own.

    A write into a view changes the node that it is differentiated by, and that of its base.
    """
    if not below_transforms(tensor)._is_view():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return own


def linearize(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate a function once and keep what a pullback needs.

    Of a :class:`Derivative` that is the function itself and its pullback, on one graph.
    """
    if not is_outermost():
        return linearize_inside(func, primals)
    grad_mode = torch.is_grad_enabled()
    with recording(), MathAttention():
        is_plain = are_plain(primals)
        # a clone of another class would be a plain tensor where nothing sees its __torch_function__
        with untracked() if is_plain else nullcontext():
            anchors = [differentiable_alias(primal, grad_mode) for primal in primals]
            # func gets clones: it may write into its inputs, and the caller's stay as they are
            makes_copies = getattr(func, "makes_copies", False)
            copies = [a.view_as(a) if makes_copies else writable_copy(a) for a in anchors]
            starts = {copy.grad_fn for copy in copies}
            is_further = grad_mode and any(primal.requires_grad for primal in primals)
        if not is_plain:
            check_kept(primals, copies)
        leads_out = LeadsOut(starts, grad_mode, is_further)
        second: Any = func if hasattr(func, "recorded") else None
        order = 1 if second is None else 2
        pull = Pull(None, (grad_mode, is_further, order), leads_out, order)
        if second is None:
            outputs, extras = watched_once(func, copies, primals, pull)
        else:
            outputs, extras = second.without_values(
                watched_once(
                    *(second.recorded, copies, primals, pull),
                    *(second.func, second.func, lambda: second.num_values),
                )
            )
    state = getattr(func, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    walk = Graph.back_to if second is None else second.graph_behind
    graph = walk(starts, (*outputs, *extras))
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = is_further or (grad_mode and graph.leads_out)
    targets = list(map(Anchor.at, anchors))
    return map_of_graph(outputs, extras, targets, graph, differentiated, as_evaluated)


def _run_backward(*task: Any) -> tuple[Tensor | None, ...]:
    """A backward pass. Checkpoints in it run parts of the function again, as they ran before."""
    try:
        return run_as_written(run_backward, *task)
    except CheckpointError:
        with MathAttention():
            return run_as_written(run_backward, *task)


def _released(leaves: Leaves) -> Leaves:
    """New tensors without a graph, which nothing can connect with the evaluation."""
    return tuple(map(Tensor.detach, leaves))


class _PlainGraph(NamedTuple):
    """A plain graph as :func:`map_of_graph` takes it, with the rules for its nodes."""

    outputs: Leaves
    anchors: Sequence[Anchor]
    nodes: set[Any]
    rules: PullbackRules
    as_evaluated: Callable[[], None] | None

    def sweep(
        self, onto: slice, of: LeafNumbers, retains: bool = True, keeps: bool | None = None
    ) -> Callable[[Leaves], Leaves]:
        """Pulls cotangents back, from some outputs onto some anchors.

        Products carry a graph if it ``keeps`` one, by default if rules and grad mode say so.
        """
        keeps = self.rules.keeps_graph and torch.is_grad_enabled() if keeps is None else keeps
        how = keeps or self.rules.is_forced, retains, self.nodes
        every = self.outputs[of] if isinstance(of, slice) else chosen_leaves(self.outputs, of)
        targets = self.anchors[onto]
        with untracked():
            active = [n for n, out in enumerate(every) if targets and out.requires_grad]
        if not active:
            return lambda _: tuple(anchor.zeros() for anchor in targets)
        is_every, edges = len(active) == len(every), tuple([each.edge for each in targets])
        sources = every if is_every else chosen_leaves(every, active)

        def swept(cotangents: Leaves) -> Leaves:
            if not is_every:
                cotangents = chosen_leaves(cotangents, active)
            if self.as_evaluated is not None:
                self.as_evaluated()
            pulled = zip(_run_backward(sources, edges, cotangents, *how), targets, strict=True)
            products = tuple([anchor.zeros() if x is None else x for x, anchor in pulled])
            if keeps:
                return products
            with untracked():
                products = tuple([x.detach() if x.requires_grad else x for x in products])
            reason = self.rules.reason  # for which products raise if somebody differentiates them
            return products if reason is None else once(products, sources, reason)

        return swept

    def transpose(self, is_checked: bool = True) -> Linearization:
        """The map of tangents: the pullback of the pullback, which is linear in its cotangents.

        Raises:
            Refused: if a backward pass is no differentiable function of its cotangents.
        """
        check_nodes(self.nodes, True)
        with outside_transforms() if is_checked else nullcontext(), recording():
            drawn = noise_like if is_checked else partial(map, torch.zeros_like)
            seeds = tuple(x.requires_grad_() for x in drawn(self.outputs))
            products = self.sweep(EVERY, EVERY, keeps=True)(seeds)
            graph = Graph.of(products, set())
            pushed = map_of_graph(products, (), list(map(Anchor.at, seeds)), graph, False)
            if is_checked:
                v = _released(products)
                check_transpose(seeds, pushed.pull(v), v, v, DETACHES, pushed.dtypes)
        return pushed


def map_of_graph(
    outputs: Leaves,
    extras: Leaves,
    anchors: Sequence[Anchor],
    graph: Graph,
    differentiated: bool,
    as_evaluated: Callable[[], None] | None = None,
) -> Linearization:
    """A plain graph from anchors to outputs, as a linear map of cotangents.

    Args:
        differentiated: may products be differentiated further?
        as_evaluated: puts a module back as it was, before each pullback, which may run it again.
    """
    rules = pullback_rules(graph.nodes, differentiated)
    plain = _PlainGraph(outputs, anchors, graph.nodes, rules, as_evaluated)
    return Linearization(
        outputs if differentiated else _released(outputs),
        extras if differentiated else _released(extras),
        plain.sweep,
        rules.is_batchable,
        rules.names,
        keeps_graph=rules.keeps_graph,
        transpose=plain.transpose,
        last=partial(plain.sweep, retains=False),
        plain=plain,
    )
