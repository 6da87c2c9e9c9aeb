"""f at a point, linearized: the only user of torch.func.jvp, torch.func.vjp and of backward passes.

Two engines pull back. Plain autograd keeps one graph and sweeps it with vmap: half the time of
torch.func at small sizes, and wider coverage. Inside another functorch transform only
torch.func.vjp can; :func:`linearize` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._attention import PlainAttention
from jacfunc._check import Refused, is_out_of_memory
from jacfunc._faults import can_be_batched, check_nodes, must_be_differentiable
from jacfunc._functorch import (
    inside_derivative,
    inside_transform,
    is_differentiated,
    lacks_forward_rule,
    num_vmap_levels,
    run_backward,
    sweep_batch,
)
from jacfunc._guard import ForwardGuard
from jacfunc._trail import note
from jacfunc._types import LeafFunction, Leaves


@dataclass(slots=True)
class Linearization:
    """The outputs at a point, and the map that takes their cotangents to those of the primals."""

    outputs: Leaves
    extras: Leaves
    sweep: Callable[[Leaves], Leaves]
    batchable: bool

    def pull(self, cotangents: Leaves) -> Leaves:
        """One cotangent: ``[*out]`` → ``[*in]``."""
        return self.sweep(_batched_like(cotangents, self.outputs))

    def pull_batch(self, cotangents: Leaves) -> Leaves:
        """K cotangents at once, ``[K, *out]`` → ``[K, *in]``: vmapped where that is right.

        A single one is never vmapped, so that ``chunk_size=1`` is the plain loop of torch.func.
        """
        if not self.batchable:
            return one_by_one(self.pull, cotangents)
        try:
            if cotangents[0].shape[0] == 1:
                # not batched by the vmaps outside, as the products of larger chunks are not
                return one_by_one(self.sweep, cotangents)
            products, _ = sweep_batch(lambda seeds: (self.sweep(seeds), ()), cotangents)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            note("the backward pass could not be batched, rows go one by one: %s", error)
            return one_by_one(self.pull, cotangents)
        return products


def one_by_one(sweep: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
    """K seeds ``[K, *shape]`` swept one after the other, without vmap."""
    products = [sweep(tuple(seed[k] for seed in seeds)) for k in range(seeds[0].shape[0])]
    return tuple(torch.stack(leaf) for leaf in zip(*products, strict=True))


def _batched_like(seeds: Leaves, leaves: Leaves) -> Leaves:
    """Seeds as they are, but batched by the vmaps outside wherever their leaves are.

    Torch may write into them, or into zeros like them, and can't write what is batched into what
    is not. Chunks of seeds go without at first: it makes every seed as large as the batch.
    """
    if not inside_transform():
        return seeds
    return tuple(seed + torch.zeros_like(leaf) for seed, leaf in zip(seeds, leaves, strict=True))


def linearize(func: LeafFunction, primals: Leaves) -> Linearization:
    """Evaluate once and keep what a pullback needs."""
    if inside_transform() or torch.compiler.is_compiling():
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
    return _push(func, primals, _batched_like(tangents, primals), outer_vmaps)


def _push(
    func: LeafFunction, primals: Leaves, tangents: Leaves, outer_vmaps: int
) -> tuple[Leaves, Leaves, Leaves]:
    copies = tuple(primal.clone() for primal in primals)
    guard = nullcontext() if torch.compiler.is_compiling() else ForwardGuard(outer_vmaps)
    try:
        with guard, _plain_attention():
            pushed: Any = torch.func.jvp(func, copies, tangents, has_aux=True)
    except Refused:
        raise
    except RuntimeError as error:
        if lacks_forward_rule(error):
            raise Refused("torch has no forward mode for it; use strategy=Reverse()") from error
        raise
    outputs, products, extras = pushed
    return outputs, products, extras


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
    with _recording(), _plain_attention():
        anchors = tuple(_anchor(primal, wanted) for primal in primals)
        # func sees clones: it may write into its inputs, and the caller's tensors stay as they are
        copies = [anchor.clone() for anchor in anchors]
        starts = {copy.grad_fn for copy in copies}
        outputs, extras = func(*copies)
    nodes, reaches_outside = _survey((*outputs, *extras), starts)
    differentiated = wanted and (reaches_outside or any(p.requires_grad for p in primals))
    live = [i for i, out in enumerate(outputs) if out.requires_grad] if anchors else []
    targets = tuple(outputs[i] for i in live)

    def sweep(cotangents: Leaves) -> Leaves:
        if not live:
            return tuple(torch.zeros_like(anchor, requires_grad=False) for anchor in anchors)
        chosen = tuple(cotangents[i] for i in live)
        products = run_backward(targets, anchors, chosen, differentiated or forced)
        return tuple(
            torch.zeros_like(anchor, requires_grad=False)
            if product is None
            else product.detach()
            if forced
            else product
            for product, anchor in zip(products, anchors, strict=True)
        )

    def released(leaves: Leaves) -> Leaves:
        return leaves if differentiated else tuple(leaf.detach() for leaf in leaves)

    check_nodes(nodes, differentiated)
    names = {node.__name__ for node in nodes}
    batchable = can_be_batched(names, differentiated)
    forced = must_be_differentiable(names, in_functorch=False) and not differentiated
    return Linearization(released(outputs), released(extras), sweep, batchable)


def _linearize_in_functorch(func: LeafFunction, primals: Leaves) -> Linearization:
    found = {"differentiated": True, "batchable": True, "differentiable": True}

    def watched(*inner: Tensor) -> tuple[Leaves, Leaves]:
        copies = [primal.clone() for primal in inner]
        if torch.compiler.is_compiling():  # where no graph can be looked at
            return func(*copies)
        starts = {copy.grad_fn for copy in copies}
        outputs, extras = func(*copies)
        found["differentiated"] = any(is_differentiated(out) for out in outputs)
        nodes, _ = _survey(outputs, starts)
        check_nodes(nodes, found["differentiated"])
        names = {node.__name__ for node in nodes}
        found["batchable"] = can_be_batched(names, found["differentiated"])
        found["differentiable"] = must_be_differentiable(names, in_functorch=True)
        return outputs, extras

    with _plain_attention():
        linearized: Any = torch.func.vjp(watched, *primals, has_aux=True)
    outputs, vjp, extras = linearized

    def sweep(cotangents: Leaves) -> Leaves:
        grad_mode = torch.is_grad_enabled()
        forced = found["differentiable"] and not inside_derivative()
        # without an outer derivative torch may take its faster, fused backward formulas
        with torch.set_grad_enabled((grad_mode and found["differentiated"]) or forced):
            products: Leaves = vjp(cotangents)
        if grad_mode or not forced:
            return products
        return tuple(product.detach() for product in products)

    return Linearization(outputs, extras, sweep, found["batchable"])


def _plain_attention() -> AbstractContextManager[Any]:
    return nullcontext() if torch.compiler.is_compiling() else PlainAttention()


def _recording() -> AbstractContextManager[Any]:
    """Autograd on, whatever the caller's mode."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext() if torch.is_grad_enabled() else torch.enable_grad()


def _anchor(primal: Tensor, wanted: bool) -> Tensor:
    """What a graph is differentiated by: an alias that nothing outside this call depends on."""
    if wanted and primal.requires_grad:
        return primal.view_as(primal)
    own = primal.clone() if primal.is_inference() else primal.detach()
    return own.requires_grad_()


def _survey(tensors: Leaves, starts: set[Any]) -> tuple[set[Any], bool]:
    """Kinds of the autograd nodes back to the starts; does a path lead to a leaf beside them?"""
    seen: set[Any] = {None, *starts}
    kinds, outside = set(), False
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        kinds.add(type(node))
        edges = node.next_functions
        pending += [edge[0] for edge in edges]
        outside = outside or (not edges and hasattr(node, "variable"))
    return kinds, outside
