"""f at a point, linearized: two engines pull back, and this is the one place that chooses.

Plain autograd keeps one graph and sweeps it with vmap: half the time of torch.func at small sizes,
and wider coverage. Inside another functorch transform only torch.func.vjp can.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from jacfunc._attention import plain_attention
from jacfunc._callers import TAKES_DERIVATIVES
from jacfunc._check import are_plain, check_kept
from jacfunc._functorch import is_outermost, recording
from jacfunc._graphs import Anchor, anchored, copied, on_graph
from jacfunc._inside import linearize_inside
from jacfunc._linearization import Linearization
from jacfunc._nested import watched_once
from jacfunc._orders import Pull
from jacfunc._types import LeafFunction, Leaves
from jacfunc._walks import Graph, leading_out
from jacfunc._watch import unseen

BY_ITSELF = frozenset(TAKES_DERIVATIVES)
"""What a function calls to take derivatives of its own."""


def linearize(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate once and keep what a pullback needs."""
    return _linearize_on_graph(func, primals) if is_outermost() else linearize_inside(func, primals)


def _linearize_on_graph(func: LeafFunction, primals: Leaves) -> Linearization:
    wanted = torch.is_grad_enabled()
    with recording(), plain_attention():
        # a clone of another class would be a plain tensor where nothing sees its __torch_function__
        with unseen() if are_plain(primals) else nullcontext():
            anchors = [anchored(primal, wanted) for primal in primals]
            # func sees clones: it may write into its inputs, and the caller's stay as they are
            copies = list(map(copied, anchors))
            starts = {copy.grad_fn for copy in copies}
            further = wanted and any(primal.requires_grad for primal in primals)
        check_kept(primals, copies)
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
