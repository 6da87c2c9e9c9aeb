"""Tells, from inside a function, which derivatives pass through a tensor, and of which order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad

from jacfunc._torch.levels import active, below_transforms, is_pushing


def is_tracked(tensor: Tensor) -> bool:
    """Does a derivative pass through the tensor, at any level of functorch or of plain autograd?"""
    top = _functorch.peek_interpreter_stack()
    if tensor.requires_grad:
        return True
    # under vmap torch can't unpack a tangent; the level below can
    if (top is None or top.key() != TransformType.Vmap) and has_tangent(tensor):
        return True
    if top is None:
        return False
    is_wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
    if is_wrapped and _functorch.maybe_get_level(tensor) == top.level():
        tensor = _functorch.get_unwrapped(tensor)
    with pyfunctorch.temporarily_pop_interpreter_stack():
        return is_tracked(tensor)


def constant(tensor: Tensor, level: int | None = None) -> Tensor:
    """The tensor without its tangent at a level of forward mode, by default the innermost."""
    if _is_at(tensor, level):
        return forward_ad.unpack_dual(tensor).primal  # type: ignore[no-any-return]
    top = _functorch.peek_interpreter_stack()
    value, tangent = _split(tensor)
    is_of_level = _functorch.maybe_get_level(value) == top.level()
    below = _functorch.get_unwrapped(value) if is_of_level else value
    with pyfunctorch.temporarily_pop_interpreter_stack():
        below = constant(below, level)
    if is_of_level and _functorch.is_batchedtensor(value):
        below = _functorch._add_batch_dim(below, _functorch.maybe_get_bdim(value), top.level())
    elif is_of_level:
        below = _functorch._wrap_for_grad(below, top.level())
    return below if tangent is None else forward_ad.make_dual(below, constant(tangent, level))


def has_tangent(tensor: Tensor, level: int | None = None) -> bool:
    """Has the tensor a tangent at a level of forward mode, by default the innermost?"""
    if _is_at(tensor, level):
        return forward_ad.unpack_dual(tensor).tangent is not None
    top = _functorch.peek_interpreter_stack()
    value, tangent = _split(tensor)
    is_of_level = _functorch.maybe_get_level(value) == top.level()
    below = _functorch.get_unwrapped(value) if is_of_level else value
    with pyfunctorch.temporarily_pop_interpreter_stack():
        is_below = has_tangent(below, level)
    return is_below or (tangent is not None and has_tangent(tangent, level))


def is_recording_at(level: int) -> bool:
    """Is grad mode on, as a level of forward mode sees it?

    A reverse level inside turns it on for itself: then what counts is how it was before.
    """
    if not torch.is_grad_enabled():
        return False
    if _functorch.maybe_current_level() == level:
        return True
    for interpreter in _functorch.get_interpreter_stack() or ():
        is_inside = interpreter.level() > level and interpreter.key() == TransformType.Grad
        if is_inside and not _functorch.CGradInterpreterPtr(interpreter).prevGradMode():
            return False
    return True


def _is_at(tensor: Tensor, level: int | None) -> bool:
    """Is the innermost transform this level of forward mode, or is there none to look below?"""
    top = _functorch.peek_interpreter_stack()
    if top is None or level is None or not _functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return top.level() == level


def _split(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tensor and its tangent, if the innermost transform is a level of forward mode."""
    top = _functorch.peek_interpreter_stack()
    if top.key() != TransformType.Jvp:
        return tensor, None
    value, tangent = forward_ad.unpack_dual(tensor)
    return value, tangent


def is_differentiated(tensor: Tensor) -> bool:
    """Inside a reverse level, is the tensor tracked by an outer level or by plain autograd, too?"""
    if is_pushing():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def num_derivatives(tensor: Tensor) -> int:
    """How many levels differentiate the tensor, plain autograd not counted."""
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


def is_second_order_forward(tensors: Iterable[Tensor], keeps_graph: bool) -> bool:
    """Is a forward level inside another derivative, a level of functorch or a plain graph?"""
    orders = [key for key in active() if key in (TransformType.Jvp, TransformType.Grad)]
    if TransformType.Jvp not in orders:
        return False
    if TransformType.Jvp in orders[1:]:
        return True
    return keeps_graph and any(_tracked_below(tensor) for tensor in tensors)


def is_third_order(tensors: Iterable[Tensor], keeps_graph: bool) -> bool:
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
