"""f at a point, linearized: two engines pull back, and this is the one place that chooses.

Plain autograd keeps one graph and sweeps it with vmap: half the time of torch.func at small sizes,
and wider coverage. Inside another functorch transform only torch.func.vjp can.
"""

from __future__ import annotations

import torch

from jacfunc._arguments import check_kept
from jacfunc._faults import TAKES_DERIVATIVES, watched_once
from jacfunc._linear_map.graph import Anchor, anchored, copied, on_graph
from jacfunc._linear_map.inside import linearize_inside
from jacfunc._linear_map.linearization import Linearization
from jacfunc._linear_map.walks import Graph, leading_out
from jacfunc._torch import Pull, is_outermost, math_attention, recording
from jacfunc._types import LeafFunction, Leaves

BY_ITSELF = frozenset(TAKES_DERIVATIVES)
"""What a function calls to take derivatives of its own."""


def linearize(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate once and keep what a pullback needs."""
    return _linearize_on_graph(func, primals) if is_outermost() else linearize_inside(func, primals)


def _linearize_on_graph(func: LeafFunction, primals: Leaves) -> Linearization:
    wanted = torch.is_grad_enabled()
    with recording(), math_attention():
        anchors = [anchored(primal, wanted) for primal in primals]
        # func sees clones: it may write into its inputs, and the caller's tensors stay as they are
        copies = list(map(copied, anchors))
        check_kept(primals, copies)
        starts = {copy.grad_fn for copy in copies}
        further = wanted and any(primal.requires_grad for primal in primals)
        pull = Pull(None, (wanted, further), leading_out(starts, wanted, further))
        outputs, extras = watched_once(func, copies, primals, pull)
    state = getattr(func, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph = Graph.back_to(starts, (*outputs, *extras))
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = further or (wanted and graph.leads_out)
    targets = list(map(Anchor.at, anchors))
    return on_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
