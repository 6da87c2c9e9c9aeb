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


def has_tangent(tensor: Tensor) -> bool:
    """Has the tensor a tangent, at the innermost level of forward mode?"""
    return forward_ad.unpack_dual(tensor).tangent is not None


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


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its tangent."""
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal


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
