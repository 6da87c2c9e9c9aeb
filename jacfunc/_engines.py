"""f at a point, linearized: the only user of torch.func.jvp, torch.func.vjp and of backward passes.

Two engines pull back. Plain autograd keeps one graph and sweeps it with vmap: half the time of
torch.func at small sizes, and wider coverage. Inside another functorch transform only
torch.func.vjp can; :func:`linearize` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from jacfunc._attention import plain_attention
from jacfunc._callers import CUT_OFF, TAKES_DERIVATIVES
from jacfunc._check import Refused, check_kept, check_plain
from jacfunc._compiled import as_written
from jacfunc._faults import (
    can_be_batched,
    check_nodes,
    check_statistics,
    must_be_differentiable,
    once_alone,
    wrong_second_derivative,
)
from jacfunc._functorch import (
    inside_derivative,
    is_differentiated,
    is_outermost,
    is_pushing,
    lacks_forward_rule,
    levels,
    newer_transforms,
    num_vmap_levels,
    off_graph,
    recording,
    run_backward,
    sweep_batch,
)
from jacfunc._graphs import Anchor, Graph, anchored, copied, leading_out, on_graph
from jacfunc._guard import Around, ForwardGuard
from jacfunc._linearization import Linearization, Some, batched_like, some_of
from jacfunc._lock import alone
from jacfunc._nested import NestedWatch
from jacfunc._orders import Pull, innermost_level, is_right_twice
from jacfunc._pages import keep_heap
from jacfunc._types import LeafFunction, Leaves
from jacfunc._watch import unwatched

BY_ITSELF = frozenset(TAKES_DERIVATIVES)
"""What a function calls to take derivatives of its own."""


def linearize(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate once and keep what a pullback needs."""
    if not is_outermost():
        return _linearize_in_functorch(func, primals)
    return _linearize_on_graph(func, primals)


def pushforward(
    func: LeafFunction, primals: Leaves, tangents: Leaves, outer_vmaps: int | None = None
) -> tuple[Leaves, Leaves, Leaves]:
    """``(outputs, products, extras)``: evaluate with a tangent riding along."""
    if outer_vmaps is None:
        outer_vmaps = num_vmap_levels()
    try:
        return _push(func, primals, tangents, outer_vmaps)
    except RuntimeError as error:
        if "vmap: inplace arithmetic" not in str(error):
            raise
    return _push(func, primals, batched_like(tangents, primals), outer_vmaps)


def _push(
    func: LeafFunction, primals: Leaves, tangents: Leaves, outer_vmaps: int
) -> tuple[Leaves, Leaves, Leaves]:
    check_plain(primals)
    copies = tuple(primal.clone() for primal in primals)
    if torch.compiler.is_compiling():
        return _jvp(func, copies, tangents)
    keep_heap()
    # grad mode is on for the guard to see where the function turns it off
    released = not torch.is_grad_enabled() and not inside_derivative()
    grad_mode = torch.enable_grad() if released else nullcontext()
    try:
        around = Around(outer_vmaps, not released)
        with grad_mode, ForwardGuard(around) as guard, plain_attention():
            pushed = _jvp(func, copies, tangents)
        guard.check_copies(primals)
    except Refused:
        raise
    except RuntimeError as error:
        if lacks_forward_rule(error):
            raise Refused("torch has no forward mode for it; use strategy=Reverse()") from error
        raise
    if not released:
        return pushed
    outputs, products, extras = map(off_graph, pushed)
    return outputs, products, extras


def _jvp(func: LeafFunction, primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves, Leaves]:
    num_outputs = 0

    def with_some_output(*inner: Tensor) -> tuple[Leaves, Leaves]:
        nonlocal num_outputs
        outputs, extras = func(*inner)
        num_outputs = len(outputs)
        return outputs or inner[:1], extras  # torch refuses to push nothing

    pushed: Any = torch.func.jvp(with_some_output, primals, tangents, has_aux=True)
    outputs, products, extras = pushed
    return outputs[:num_outputs], products[:num_outputs], extras


def pushforward_batch(
    func: LeafFunction, primals: Leaves, tangents: Leaves, randomness: str
) -> tuple[Leaves, Leaves, Leaves]:
    """K tangents at once, ``[K, *in]`` → products ``[K, *out]``; outputs and extras as they are."""

    num_outputs, outer_vmaps = 0, num_vmap_levels()

    def push(seeds: Leaves) -> tuple[Leaves, Leaves]:
        nonlocal num_outputs
        outputs, products, extras = pushforward(func, primals, seeds, outer_vmaps)
        num_outputs = len(outputs)
        return products, (*outputs, *extras)

    products, rest = sweep_batch(push, tangents, randomness)
    return rest[:num_outputs], products, rest[num_outputs:]


def _linearize_on_graph(func: LeafFunction, primals: Leaves) -> Linearization:
    wanted = torch.is_grad_enabled()
    with recording(), plain_attention():
        anchors = tuple(anchored(primal, wanted) for primal in primals)
        # func sees clones: it may write into its inputs, and the caller's tensors stay as they are
        copies = list(map(copied, anchors))
        check_kept(primals, copies)
        starts = {copy.grad_fn for copy in copies}
        further = wanted and any(primal.requires_grad for primal in primals)
        pull = Pull(None, (wanted, further), leading_out(starts, wanted, further))
        outputs, extras = watched_once(func, copies, primals, pull)
    state = getattr(func, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph = Graph.of((*outputs, *extras), starts)
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = wanted and (graph.leads_out or any(p.requires_grad for p in primals))
    targets = list(map(Anchor.at, anchors))
    return on_graph(outputs, extras, targets, graph, differentiated, as_evaluated)


def watched_once(
    func: LeafFunction,
    copies: Sequence[Tensor],
    primals: Leaves,
    pull: Pull,
    call: Any = None,
) -> tuple[Leaves, Leaves]:
    """Evaluate at copies of the primals; watched, unless it met nothing when last called so.

    A watch costs a tenth of a small Jacobian, and what it looks for hardly depends on numbers;
    but a function that may catch errors is watched at every call. ``call`` says what is called,
    where ``func`` does not.
    """
    keep_heap()
    call = func if call is None else call
    inner, kind = getattr(call, "kind_of_call", (None, None))
    kind = (kind, pull.around)
    known = None if inner is None or is_pushing() else unwatched().get(inner, kind)
    if known is not None:
        with alone() if known else nullcontext():
            return func(*copies)
    shares = bool(getattr(call, "may_share_module", False))
    with alone() if shares else nullcontext(), NestedWatch(pull, primals=copies) as watch:
        found = func(*copies)
    watch.check_copies(primals)
    if watch.has_cut_off and not all(out.requires_grad for out in found[0]):
        raise Refused(CUT_OFF)
    functions = getattr(call, "functions", (inner,))
    # modules are evaluated alone, and other functions that draw are watched, to draw alone
    draws = watch.drew and inner is getattr(call, "func", None)
    if inner is not None and not (watch.met or draws or any(map(_may_catch, functions))):
        unwatched().put(inner, kind, shares)
    return found


def _may_catch(function: Any) -> bool:
    """Could it catch an error? Of what is not Python's nobody knows."""
    code = getattr(function, "__code__", None)
    return code is None or bool(code.co_exceptiontable)


def _linearize_in_functorch(func: LeafFunction, primals: Leaves) -> Linearization:
    around = torch.is_grad_enabled(), levels()
    found = {"differentiated": True, "batchable": True, "differentiable": True}
    ends: list[tuple[Leaves, Leaves]] = []  # of torch's graph, as this level of it sees them
    nodes: set[Any] = set()
    depth = len(newer_transforms(0))
    is_inside, reason = inside_derivative(), None
    check_plain(primals)

    def watched(*inner: Tensor) -> tuple[Leaves, Leaves]:
        nonlocal reason
        copies = [primal.clone() for primal in inner]
        if torch.compiler.is_compiling():  # where no graph can be looked at
            return func(*copies)
        starts = {copy.grad_fn for copy in copies}
        pull = Pull(innermost_level(), around)
        outputs, extras = watched_once(func, copies, primals, pull)
        ends[:] = [(inner, outputs)]
        found["differentiated"] = any(is_differentiated(out) for out in outputs)
        graph = Graph.of(outputs, starts)
        check_nodes(graph.nodes, found["differentiated"] and is_inside)
        if found["differentiated"] and (reason := wrong_second_derivative(graph.nodes)):
            found["differentiated"] = False
        nodes.update(graph.nodes)
        names = graph.names
        if found["differentiated"] and not is_right_twice(innermost_level()):
            check_statistics(names)
        found["batchable"] = can_be_batched(names, found["differentiated"])
        found["differentiable"] = must_be_differentiable(names, in_functorch=True)
        return outputs, extras

    # a module's outputs are looked at below functorch, too: who keeps no graph records only
    # what leads to tensors of before the call
    looks = getattr(func, "state", None) is not None and not torch.is_grad_enabled()
    with plain_attention(), torch.enable_grad() if looks else nullcontext():
        cut = off_graph(primals) if looks else primals
        linearized: Any = torch.func.vjp(watched, *cut, has_aux=True)
    outputs, vjp, extras = linearized
    if looks:
        outputs, extras = off_graph(outputs), off_graph(extras)

    def sweep(cotangents: Leaves, onto: slice, of: Some) -> Leaves:
        grad_mode = torch.is_grad_enabled()
        forced = found["differentiable"] and not inside_derivative()
        differentiated = found["differentiated"]
        if (
            grad_mode
            and not differentiated
            and any(seed.requires_grad or is_differentiated(seed) for seed in cotangents)
        ):
            check_nodes(nodes, True)
            differentiated = True
        # without an outer derivative torch may take its faster, fused backward formulas
        with torch.set_grad_enabled((grad_mode and differentiated) or forced), as_written():
            if ends:
                products = _pulled_inside(*ends[0], primals, cotangents, onto, of)
            else:  # compilers know torch's own pullback alone, of all outputs
                every = list(map(torch.zeros_like, outputs))
                numbers = range(len(every))[of] if isinstance(of, slice) else of
                for number, seed in zip(numbers, cotangents, strict=True):
                    every[number] = seed
                products = vjp(tuple(every))[onto]
        if reason and grad_mode:
            return tuple([once_alone(product, outputs[0], reason) for product in products])
        if grad_mode or not forced:
            return products
        return tuple(product.detach() for product in products)

    names = {node.__name__ for node in nodes}
    return Linearization(outputs, extras, sweep, found["batchable"], names, depth)


def _pulled_inside(
    inner: Leaves, outer: Leaves, primals: Leaves, cotangents: Leaves, onto: slice, of: Some
) -> Leaves:
    """Cotangents of some outputs, pulled back through these alone, as torch pulls all of them.

    ``inner`` and ``outer`` are the primals and the outputs as a level of functorch sees them.
    """
    pairs = zip(some_of(outer, of), cotangents, strict=True)
    live = [(out, seed) for out, seed in pairs if out.requires_grad]
    if not live:
        return tuple(map(torch.zeros_like, primals[onto]))
    targets, seeds = zip(*live, strict=True)
    products = run_backward(targets, inner[onto], seeds, torch.is_grad_enabled())
    return tuple(
        torch.zeros_like(primal) if product is None else product
        for product, primal in zip(products, primals[onto], strict=True)
    )
