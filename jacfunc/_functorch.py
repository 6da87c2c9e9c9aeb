"""functorch and autograd from below: with ``_mapped`` the only importers of their private parts.

Which transforms are active; a vmap and an ``autograd.grad`` without their checks, which are slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.utils._python_dispatch import _disable_current_modes

from jacfunc._check import check_plain
from jacfunc._lock import holds_alone
from jacfunc._types import Leaves


def inside_functorch() -> bool:
    """Is a functorch transform active?"""
    return _functorch.peek_interpreter_stack() is not None


def inside_transform() -> bool:
    """Is a functorch transform active, or plain forward mode? Only functorch nests in these."""
    return inside_functorch() or is_pushing()


def is_outermost() -> bool:
    """Is neither a transform active nor a compiler? Then plain graphs can be looked into."""
    return not (inside_transform() or torch.compiler.is_compiling())


@contextmanager
def outside_transforms() -> Iterator[None]:
    """As at the top level, whatever transforms and dispatch modes are active outside."""
    with pyfunctorch.temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def recording() -> AbstractContextManager[Any]:
    """Autograd on, whatever the caller's mode."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return _NOTHING if torch.is_grad_enabled() else torch.enable_grad()


_NOTHING = nullcontext()


def memory_of(tensor: Tensor) -> int:
    """Equal for tensors of which writing into one writes into the other."""
    if torch.compiler.is_compiling():  # compiled code is functional: nobody writes
        return id(tensor)
    return int(below_transforms(tensor).untyped_storage()._cdata)


def levels() -> tuple[object, ...]:
    """What is active outside, for telling one situation from another."""
    return (*active(), is_pushing())


def newer_transforms(number: int) -> list[str]:
    """Kinds of the active ones but for so many that are outermost: Vmap, Grad, Jvp and others."""
    return [key.name for key in active()[number:]]


def has_tangent(tensor: Tensor) -> bool:
    """Does forward mode track it, at the innermost level?"""
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_tracked(tensor: Tensor) -> bool:
    """Does a derivative pass through it, at whatever level, plain ones among them?"""
    top = _functorch.peek_interpreter_stack()
    if tensor.requires_grad:
        return True
    # torch has no rule for asking under vmap, where the level below knows
    if (top is None or top.key() != TransformType.Vmap) and has_tangent(tensor):
        return True
    if top is None:
        return False
    is_wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
    if is_wrapped and _functorch.maybe_get_level(tensor) == top.level():
        tensor = _functorch.get_unwrapped(tensor)
    with pyfunctorch.temporarily_pop_interpreter_stack():
        return is_tracked(tensor)


def is_batched(tensor: Tensor) -> bool:
    """Do its values, not its tangent alone, differ along a vmap outside?"""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its tangent."""
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal


def num_vmap_levels() -> int:
    """How many vmaps are active."""
    return sum(key == TransformType.Vmap for key in active())


def num_forward_levels() -> int:
    """How many pushforwards are active, functorch's or plain."""
    plain = forward_ad._current_level + 1
    return max(plain, sum(key == TransformType.Jvp for key in active()))


def inside_derivative() -> bool:
    """Is something active that differentiates what happens inside it, beside plain autograd?"""
    return is_pushing() or TransformType.Grad in active()


def is_differentiated(tensor: Tensor) -> bool:
    """Seen from a reverse level: does an enclosing level, or plain autograd, track it too?"""
    if is_pushing():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def sweep_batch(
    sweep: Callable[[Leaves], tuple[Leaves, Leaves]],
    seeds: Leaves,
    randomness: str = "same",
    dims: Sequence[int | None] | None = None,
) -> tuple[Leaves, Leaves]:
    """``torch.vmap`` over a dimension of flat seeds, the first by default, at less overhead.

    ``sweep(seed) -> (products, rest)``: products come back as ``[K, *shape]``, the rest, which
    no seed should change, as it was for the first seed.
    """
    dims = (0,) * len(seeds) if dims is None else dims
    check_plain(seeds)
    if torch.compiler.is_compiling():
        return _sweep_batch_traceably(sweep, seeds, randomness, dims)
    pairs = [*zip(seeds, dims, strict=True)]
    sizes = [s.shape[d] for s, d in pairs if d is not None]
    size = sizes[0]
    level = _functorch._vmap_increment_nesting(size, randomness)
    wrap, unwrap = _functorch._add_batch_dim, _functorch._remove_batch_dim
    try:
        products, rest = sweep(tuple([s if d is None else wrap(s, d, level) for s, d in pairs]))
        return (
            tuple([unwrap(product, level, size, 0) for product in products]),
            tuple([unwrap(x, level, size, 0)[0] if _is_batched(x, level) else x for x in rest]),
        )
    finally:
        _functorch._vmap_decrement_nesting()


def _sweep_batch_traceably(
    sweep: Callable[[Leaves], tuple[Leaves, Leaves]],
    seeds: Leaves,
    randomness: str,
    dims: Sequence[int | None],
) -> tuple[Leaves, Leaves]:
    """The same by torch.vmap itself, which the compiler knows."""
    in_dims: Any = (tuple(dims),)
    out_dims: Any = (0, None)
    batched: Any = torch.vmap(sweep, in_dims=in_dims, out_dims=out_dims, randomness=randomness)
    products, rest = batched(seeds)
    return products, rest


def run_backward(
    outputs: Leaves,
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Leaves,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with ``retain_graph`` and ``allow_unused``."""
    products: tuple[Tensor | None, ...] = _engine_run_backward(
        outputs,
        cotangents,
        True,  # retain_graph
        create_graph,
        inputs,
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return products


def _is_batched(tensor: Tensor, level: int) -> bool:
    is_wrapped = _functorch.is_batchedtensor(tensor)
    return is_wrapped and _functorch.maybe_get_level(tensor) == level


def active() -> list[TransformType]:
    """The active transforms, outermost first."""
    if torch.compiler.is_compiling():
        return []
    stack = _functorch.get_interpreter_stack()
    return [interpreter.key() for interpreter in stack] if stack else []


def is_pushing() -> bool:
    """Is forward mode active in this thread? Torch counts its level for all threads at once."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    if TransformType.Jvp in active():
        return True
    return holds_alone(lambda: forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING)


def below_transforms(tensor: Tensor) -> Tensor:
    """The tensor below all levels, where the dimensions of the vmaps outside are seen."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def off_graph(leaves: Leaves) -> Leaves:
    """Without plain graphs, which lead to what a function closes over; most leaves have none."""
    return tuple([x.detach() if below_transforms(x).requires_grad else x for x in leaves])


def lacks_forward_kernel(op: torch._ops.OpOverload) -> bool:
    """Operators of ``torch.library.custom_op`` register a backward alone."""
    if op.namespace in {"aten", "prim", "prims", "profiler"}:
        return False
    name = op._schema.name
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not has_kernel(name, "CompositeImplicitAutograd")
