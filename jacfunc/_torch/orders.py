"""Counts, from inside a function, the order of the derivative that is taken of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import pyfunctorch

from jacfunc._torch.derivatives import has_tangent
from jacfunc._torch.levels import active, below_transforms, is_pushing


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
