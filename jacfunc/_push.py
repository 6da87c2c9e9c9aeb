"""Tangents pushed forward through a function: the only user of torch.func.jvp."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from jacfunc._attention import plain_attention
from jacfunc._check import check_plain
from jacfunc._errors import Refused, is_of_old_style, lacks_forward_rule
from jacfunc._functorch import (
    inside_derivative,
    num_vmap_levels,
    off_graph,
    sweep_batch,
)
from jacfunc._guard import Around, ForwardGuard
from jacfunc._linearization import batched_like
from jacfunc._orders import at_forward_level
from jacfunc._pages import keep_heap
from jacfunc._types import LeafFunction, Leaves


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
        if lacks_forward_rule(error) or is_of_old_style(error):
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

    if torch.compiler.is_compiling():
        pushed: Any = torch.func.jvp(with_some_output, primals, tangents, has_aux=True)
    else:
        pushed = at_forward_level(with_some_output, primals, tangents)
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
