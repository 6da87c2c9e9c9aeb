"""Plain autograd graphs as linear maps: cotangents are pulled back through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from jacfunc._attention import plain_attention
from jacfunc._compiled import run_as_written
from jacfunc._errors import Refused
from jacfunc._faults import (
    can_be_batched,
    check_nodes,
    must_be_differentiable,
    once,
    wrong_second_derivative,
)
from jacfunc._functorch import (
    outside_transforms,
    recording,
    run_backward,
)
from jacfunc._linearization import EVERY, Linearization, Some, some_of
from jacfunc._types import Leaves
from jacfunc._walks import Graph
from jacfunc._watch import unseen


class Anchor(NamedTuple):
    """What a graph is differentiated by: a tensor, or the edge where one came out."""

    edge: Tensor | GradientEdge
    zeros: Callable[[], Tensor]
    """The product where no path leads there."""

    @classmethod
    def at(cls, tensor: Tensor) -> Anchor:
        return cls(tensor, partial(torch.zeros_like, tensor, requires_grad=False))

    @classmethod
    def behind(cls, tensor: Tensor) -> Anchor:
        """At what a tensor is now, whatever is written into it later; it is not kept."""
        zeros = partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return cls(get_gradient_edge(tensor), zeros)


def anchored(primal: Tensor, wanted: bool) -> Tensor:
    """An alias to differentiate by, that nothing outside this call depends on."""
    if wanted and primal.requires_grad:
        return primal.view_as(primal)
    own = primal.clone() if primal.is_inference() else primal.detach()
    return own.requires_grad_()


def copied(anchor: Tensor) -> Tensor:
    """A clone for the function to write into, in which each sample lies as the anchor does."""
    if anchor.is_contiguous() or 0 not in anchor.stride():
        return anchor.clone()
    # torch's own clone puts what was expanded, the samples, innermost
    strides = list(anchor.stride())
    step = 1
    for dim in sorted(range(anchor.dim()), key=lambda d: (strides[d] == 0, strides[d])):
        strides[dim], step = step, step * anchor.shape[dim]
    # no view: a write into one would go by the node that it came out of
    own = torch.empty_strided(anchor.shape, strides, dtype=anchor.dtype, device=anchor.device)
    return own.copy_(anchor)


def _transposed(outputs: Leaves, sweep: Callable[[Leaves], Leaves]) -> Linearization:
    """The map of tangents: the pullback of the pullback, which is linear in its cotangents.

    Raises:
        Refused: if a backward pass is no differentiable function of its cotangents.
    """
    with outside_transforms(), recording():
        seeds = tuple(_noise(out).requires_grad_() for out in outputs)
        products = sweep(seeds)
        graph = Graph.of(products, set())
        pushed = on_graph(products, (), list(map(Anchor.at, seeds)), graph, False)
        _check_adjoint(seeds, products, pushed.pull(tuple(x.detach() for x in products)))
    return pushed


def _noise(like: Tensor) -> Tensor:
    """The same every time, and nobody else's numbers."""
    generator = torch.Generator(like.device).manual_seed(0)
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    return noise.to(like.dtype)


def _check_adjoint(seeds: Leaves, products: Leaves, pushed: Leaves) -> None:
    """``⟨u, J Jᵀ u⟩ = ⟨Jᵀ u, Jᵀ u⟩`` for the seeds u and the products ``Jᵀ u``."""
    with torch.no_grad():
        terms = [u.double() * v.double() for u, v in zip(seeds, pushed, strict=True)]
        squares = sum(float(x.double().square().sum()) for x in products)
    apart = abs(sum(float(x.sum()) for x in terms) - squares)
    scale = max(squares, sum(float(x.abs().sum()) for x in terms))
    rounding = max(torch.finfo(x.dtype).eps for x in (*seeds, *products))
    if apart > rounding**0.5 * scale:
        raise Refused("it detaches its cotangent, as a hook or an autograd.Function may do")


def _run_backward(*task: Any) -> tuple[Tensor | None, ...]:
    """A backward pass in which checkpoints run parts of the function again, as they ran before."""
    try:
        return run_as_written(run_backward, *task)
    except CheckpointError:
        with plain_attention():
            return run_as_written(run_backward, *task)


def _tracked(leaves: Leaves) -> list[int]:
    """Numbers of those that have a graph: a watch outside would look for who asks."""
    with unseen():
        return [number for number, leaf in enumerate(leaves) if leaf.requires_grad]


def _untracked(leaves: Leaves) -> Leaves:
    with unseen():
        return tuple([leaf.detach() if leaf.requires_grad else leaf for leaf in leaves])


def on_graph(
    outputs: Leaves,
    extras: Leaves,
    anchors: Sequence[Anchor],
    graph: Graph,
    differentiated: bool,
    as_evaluated: Callable[[], None] | None = None,
) -> Linearization:
    """A plain graph from the anchors to the outputs, as a map of cotangents.

    ``as_evaluated`` is called before each pullback: backward passes may run a module again.
    """

    def swept(cotangents: Leaves, onto: slice, of: Some, keeps: bool) -> Leaves:
        wanted_by, some = anchors[onto], some_of(outputs, of)
        live = _tracked(some) if anchors else []
        if not live:
            return tuple(anchor.zeros() for anchor in wanted_by)
        targets, chosen = tuple([some[i] for i in live]), tuple([cotangents[i] for i in live])
        edges = tuple([anchor.edge for anchor in wanted_by])
        if as_evaluated is not None:
            as_evaluated()
        products = _run_backward(targets, edges, chosen, keeps or forced)
        pairs = zip(products, wanted_by, strict=True)
        every = tuple([anchor.zeros() if x is None else x for x, anchor in pairs])
        if keeps:
            return every
        cut = _untracked(every)
        return cut if reason is None else once(cut, some, reason)

    def sweep(cotangents: Leaves, onto: slice, of: Some) -> Leaves:
        return swept(cotangents, onto, of, keeps_graph and torch.is_grad_enabled())

    def transpose() -> Linearization:
        check_nodes(graph.nodes, True)
        return _transposed(outputs, partial(swept, onto=EVERY, of=EVERY, keeps=True))

    def released(leaves: Leaves) -> Leaves:
        return leaves if differentiated else tuple([leaf.detach() for leaf in leaves])

    check_nodes(graph.nodes, differentiated=False)
    reason = wrong_second_derivative(graph.nodes) if differentiated else None
    keeps_graph = differentiated and reason is None
    names = graph.names
    batchable = can_be_batched(names, keeps_graph)
    forced = must_be_differentiable(names, in_functorch=False)
    found = released(outputs), released(extras)
    return Linearization(*found, sweep, batchable, names, 0, keeps_graph, transpose)
