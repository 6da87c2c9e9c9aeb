"""Plain autograd from below: what is tracked, and a backward pass without its checks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, _engine_run_backward

from jacfunc._torch.levels import NOTHING, below_transforms, is_pushing
from jacfunc._types import Leaves


def recording() -> AbstractContextManager[Any]:
    """Autograd on, whatever the caller's mode."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return NOTHING if torch.is_grad_enabled() else torch.enable_grad()


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


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its tangent."""
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal


def is_differentiated(tensor: Tensor) -> bool:
    """Seen from a reverse level: does an enclosing level, or plain autograd, track it too?"""
    if is_pushing():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


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


def off_graph(leaves: Leaves) -> Leaves:
    """Without plain graphs, which lead to what a function closes over; most leaves have none."""
    return tuple([x.detach() if below_transforms(x).requires_grad else x for x in leaves])
