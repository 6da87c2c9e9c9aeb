"""Tangents pushed forward through a function, by torch.func.jvp, which is called here alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_plain
from jacfunc._errors import Refused, is_of_old_style, lacks_forward_rule
from jacfunc._faults import (
    ForwardWatch,
    PushContext,
    check_stays_in_torch,
    is_unwatched,
    note_unwatched,
)
from jacfunc._linear_map.linearization import batched_like
from jacfunc._lock import alone
from jacfunc._memory import keep_heap
from jacfunc._torch import (
    MathAttention,
    at_forward_level,
    has_tangent,
    inside_derivative,
    num_vmap_levels,
    off_graph,
    recording,
    run_as_written,
    sweep_batch,
)
from jacfunc._types import LeafFunction, Leaves


def pushforward(
    func: LeafFunction, primals: Leaves, tangents: Leaves, outer_vmaps: int | None = None
) -> tuple[Leaves, Leaves, Leaves]:
    """Outputs, products of the tangents and extras of one evaluation.

    ``outer_vmaps`` is the number of vmaps around it, not counting one over its tangents.

    Raises:
        Refused: if torch has no forward mode for the function, or gets it wrong.
    """
    if outer_vmaps is None:
        outer_vmaps = num_vmap_levels()
    try:
        return _push(func, primals, tangents, outer_vmaps)
    except RuntimeError as error:
        if "vmap: inplace arithmetic" not in str(error):
            raise
    return _push(func, primals, batched_like(tangents, primals), outer_vmaps)


def push_on_graph(
    func: LeafFunction, copies: Leaves, tangents: Leaves
) -> tuple[Leaves, Leaves, Leaves]:
    """Outputs, products of the tangents and extras of an evaluation whose graph is kept.

    The graph is that of the outputs, from ``copies`` of primals that require gradients. Products
    are constants to it: nobody may differentiate them.

    Raises:
        Refused: as :func:`pushforward`.
    """
    check_plain(copies)
    own = tuple(tangent.clone() for tangent in tangents)
    with alone():
        pushed, _ = _watched(func, copies, copies, own, PushContext(0, False))
    outputs, products, extras = pushed
    return outputs, tuple(product.detach() for product in products), extras


def _push(
    func: LeafFunction, primals: Leaves, tangents: Leaves, outer_vmaps: int
) -> tuple[Leaves, Leaves, Leaves]:
    check_plain(primals)
    copies = tuple(primal.clone() for primal in primals)
    if torch.compiler.is_compiling():
        return _jvp(func, copies, tangents)
    keep_heap()
    # grad mode is on, so that the watch sees where the function turns it off
    released = not torch.is_grad_enabled() and not inside_derivative()
    with torch.enable_grad() if released else nullcontext():
        around = PushContext(outer_vmaps, not released)
        known = None if outer_vmaps or inside_derivative() else (_PUSHED, around)
        pushed = _watched_once(func, copies, primals, tangents, around, known)
    if not released:
        return pushed
    outputs, products, extras = map(off_graph, pushed)
    return outputs, products, extras


def _watched_once(
    func: LeafFunction,
    copies: Leaves,
    primals: Leaves,
    tangents: Leaves,
    around: PushContext,
    known: Hashable,
) -> tuple[Leaves, Leaves, Leaves]:
    """A push of tangents, watched unless an earlier one has shown nothing to watch for.

    A watch takes a third of a small push. Functions that call modules are always watched, whose
    hooks forward mode passes by.

    Args:
        known: equal for pushes of which one tells about all; None where none does.
    """
    if known is None or _may_call_module(func):
        return _watched(func, copies, primals, tangents, around)[0]
    if is_unwatched(func, known):
        with _refusing(), MathAttention():
            return _jvp(func, copies, tangents)
    pushed, watch = _watched(func, copies, primals, tangents, around)
    note_unwatched(func, known, watch)
    return pushed


def _may_call_module(func: LeafFunction) -> bool:
    is_module = getattr(func, "state", None) is not None
    return is_module or getattr(func, "may_share_module", True)


_PUSHED = "pushed"
"""Tells pushes from pullbacks among what is known of functions that need no watch."""


def is_pushed_unwatched(func: LeafFunction) -> bool:
    """Have earlier pushes of this kind, outside of transforms, shown nothing to watch for?"""
    around = PushContext(0, torch.is_grad_enabled())
    return not _may_call_module(func) and is_unwatched(func, (_PUSHED, around))


def pushed_tensor(
    func: Callable[[Tensor], Any], primal: Tensor, tangents: Tensor, randomness: str
) -> tuple[Tensor, Tensor]:
    """What a function returns for a tensor, and products ``[K, *out]`` of K tangents of that.

    The function is one that needs no watch, and nobody else looks at what torch does.

    Raises:
        RuntimeError: if it returns something other than a tensor.
    """

    def call(*inner: Tensor) -> tuple[Leaves, Leaves]:
        out = run_as_written(func, *inner)
        if type(out) is not Tensor:
            raise Refused("it returns another output")
        return (out,), ()

    def push(seeds: Leaves) -> tuple[Leaves, Leaves]:
        outputs, products, _ = at_forward_level(call, (primal.clone(),), seeds)
        return products, outputs

    keeps_graph = torch.is_grad_enabled()
    with alone(), recording(), MathAttention():
        (columns,), (out,) = sweep_batch(push, (tangents,), randomness)
    return (out, columns) if keeps_graph else (out.detach(), columns.detach())


def _watched(
    func: LeafFunction, copies: Leaves, primals: Leaves, tangents: Leaves, around: PushContext
) -> tuple[tuple[Leaves, Leaves, Leaves], ForwardWatch]:
    """A push of tangents of the copies under the watch of forward mode, and the watch."""
    constants: list[int] = []

    def noting(*inner: Tensor) -> tuple[Leaves, Leaves]:
        outputs, extras = func(*inner)
        if watch.leaves_torch:
            constants.extend(n for n, out in enumerate(outputs) if not has_tangent(out))
        return outputs, extras

    with _refusing():
        with ForwardWatch(around) as watch, MathAttention():
            pushed = _jvp(noting, copies, tangents)
        watch.check_copies(primals)
        watch.stays_watched |= watch.leaves_torch
        if constants:
            check_stays_in_torch(func, primals, pushed[0], constants)
    return pushed, watch


@contextmanager
def _refusing() -> Iterator[None]:
    """A context in which an error about a lack of forward mode is a refusal."""
    try:
        yield
    except Refused:
        raise
    except RuntimeError as error:
        if lacks_forward_rule(error) or is_of_old_style(error):
            raise Refused("torch has no forward mode for it; use strategy=Reverse()") from error
        raise


def _jvp(func: LeafFunction, primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves, Leaves]:
    num_outputs = 0

    def with_an_output(*inner: Tensor) -> tuple[Leaves, Leaves]:
        nonlocal num_outputs
        outputs, extras = func(*inner)
        num_outputs = len(outputs)
        return outputs or inner[:1], extras  # torch refuses to push nothing

    if torch.compiler.is_compiling():
        pushed: Any = torch.func.jvp(with_an_output, primals, tangents, has_aux=True)
    else:
        pushed = at_forward_level(with_an_output, primals, tangents)
    outputs, products, extras = pushed
    return outputs[:num_outputs], products[:num_outputs], extras


def pushforward_batch(
    func: LeafFunction, primals: Leaves, tangents: Leaves, randomness: str
) -> tuple[Leaves, Leaves, Leaves]:
    """Outputs, products ``[K, *out]`` of K tangents ``[K, *in]`` and extras of one evaluation."""

    num_outputs, outer_vmaps = 0, num_vmap_levels()

    def push(seeds: Leaves) -> tuple[Leaves, Leaves]:
        nonlocal num_outputs
        outputs, products, extras = pushforward(func, primals, seeds, outer_vmaps)
        num_outputs = len(outputs)
        return products, (*outputs, *extras)

    products, rest = sweep_batch(push, tangents, randomness)
    return rest[:num_outputs], products, rest[num_outputs:]
