"""Tells, from inside a function, whether a derivative passes through a tensor."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad

from jacfunc._torch.levels import is_pushing


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
