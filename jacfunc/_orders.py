"""Levels of derivatives: entered, and counted from inside, where operations are met."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from jacfunc._functorch import active, below_transforms, has_tangent, is_pushing
from jacfunc._types import LeafFunction, Leaves

_HOOKED = "torch.func.vjp doesn't support saved tensor hooks"


def at_reverse_level(func: LeafFunction, primals: Leaves) -> tuple[Leaves, Leaves]:
    """Outputs and extras of an evaluation at a level of its own, as ``torch.func.vjp`` makes it.

    Without the trees of that, which cost as much as a small evaluation; where nobody compiles.
    """
    with disable_saved_tensors_hooks(_HOOKED):
        level = _functorch._grad_increment_nesting()
        try:
            with torch.enable_grad():
                inner = [_functorch._wrap_for_grad(primal, level) for primal in primals]
                with eager_transforms.enable_inplace_requires_grad(True):
                    for tensor in inner:  # by torch's own code: watches look at who asks for it
                        eager_transforms._set_tensor_requires_grad(tensor)
                outputs, extras = func(*inner)
                eager_transforms.assert_non_empty_tensor_output([*outputs], "vjp(f, *primals)")
                return _below(outputs, level), _below(extras, level)
        finally:
            _functorch._grad_decrement_nesting()


def at_forward_level(
    func: LeafFunction, primals: Leaves, tangents: Leaves
) -> tuple[Leaves, Leaves, Leaves]:
    """Outputs, products and extras, as of ``torch.func.jvp``; where nobody compiles."""
    level = eager_transforms.enter_jvp_nesting()
    try:
        is_first = eager_transforms.JVP_NESTING == 1
        plain = forward_ad.dual_level() if is_first else nullcontext()
        with forward_ad._set_fwd_grad_enabled(True), plain:
            pairs = zip(primals, tangents, strict=True)
            outputs, extras = func(*[forward_ad.make_dual(x, v) for x, v in pairs])
            unpacked = [eager_transforms.safe_unpack_dual(out, strict=False) for out in outputs]
            values, products = zip(*unpacked, strict=True)
            return _below(values, level), _below(products, level), _below(extras, level)
    finally:
        eager_transforms.exit_jvp_nesting()


def _below(leaves: Leaves, level: int) -> Leaves:
    return tuple([_functorch._unwrap_for_grad(leaf, level) for leaf in leaves])


def innermost_level() -> int | None:
    """Of the transform that sees operations first."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else int(top.level())


def num_derivatives(tensor: Tensor) -> int:
    """Of how many levels does a derivative pass through it, plain autograd not counted?"""
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return int(is_pushing() and has_tangent(tensor))
    tracks = top.key() == TransformType.Grad and tensor.requires_grad
    tracks = tracks or (top.key() == TransformType.Jvp and has_tangent(tensor))
    is_wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
    if is_wrapped and _functorch.maybe_get_level(tensor) == top.level():
        tensor = _functorch.get_unwrapped(tensor)
    with pyfunctorch.temporarily_pop_interpreter_stack():
        return tracks + num_derivatives(tensor)


def is_right_twice(level: int | None) -> bool:
    """Is a pullback of ours, at this level of functorch or on a plain graph, the innermost?

    It loops where torch's second derivative is wrong under vmap; a vmap between it and the
    derivative outside does not.
    """
    stack = _functorch.get_interpreter_stack() or []
    if level is None or not stack:
        return level is None and not stack
    keys = [interpreter.key() for interpreter in stack]
    first = next(i for i, key in enumerate(keys) if key != TransformType.Vmap)
    is_ours = keys[-1] == TransformType.Grad and stack[-1].level() == level
    return is_ours and TransformType.Vmap not in keys[first:]


def is_second_order_forward(tensors: Iterable[Tensor], keeps_graph: bool) -> bool:
    """Is a forward level inside another derivative, a level of functorch or a plain graph?"""
    orders = [key for key in active() if key in (TransformType.Jvp, TransformType.Grad)]
    if TransformType.Jvp not in orders:
        return False
    if TransformType.Jvp in orders[1:]:
        return True
    return keeps_graph and any(_tracked_below(tensor) for tensor in tensors)


def is_reverse_of_second_forward(tensors: Iterable[Tensor], keeps_graph: bool) -> bool:
    """Does a reverse level surround two others, a forward level among them?"""
    orders = [key for key in active() if key in (TransformType.Jvp, TransformType.Grad)]
    if TransformType.Jvp not in orders or len(orders) < 2:
        return False
    if orders[0] == TransformType.Grad:
        return len(orders) > 2
    return keeps_graph and any(_tracked_below(tensor) for tensor in tensors)


def _tracked_below(tensor: Tensor) -> bool:
    """Does plain autograd, below all levels, track the tensor?"""
    return below_transforms(tensor).requires_grad and torch.is_grad_enabled()


@dataclass(slots=True)
class Pull:
    """What is watched for: a pullback of ours.

    Args:
        level: of functorch; None on a plain graph.
        around: what tells whether it is differentiated further.
        leads_out: of a plain graph: is what leads to a tensor differentiated further outside?
    """

    level: int | None
    around: Hashable
    leads_out: Callable[[Tensor], bool] | None = None
