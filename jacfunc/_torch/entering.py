"""Evaluates a function at a level of derivatives of its own, without the trees of torch.func.

The trees of torch.func cost as much as a small evaluation. A compiler can trace torch.func alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from jacfunc._arguments import are_plain
from jacfunc._torch.autograd import untracked
from jacfunc._torch.levels import is_batched
from jacfunc._types import LeafFunction, Leaves

_HOOKED = "torch.func.vjp doesn't support saved tensor hooks"


def at_reverse_level(func: LeafFunction, primals: Leaves) -> tuple[Leaves, Leaves]:
    """Outputs and extras of an evaluation at a new reverse level, as in ``torch.func.vjp``."""
    with disable_saved_tensors_hooks(_HOOKED):
        level = _functorch._grad_increment_nesting()
        try:
            with torch.enable_grad():
                inner = [_functorch._wrap_for_grad(primal, level) for primal in primals]
                with eager_transforms.enable_inplace_requires_grad(True):
                    for (
                        tensor
                    ) in inner:  # torch's own code does it, as watches look at which code calls it
                        eager_transforms._set_tensor_requires_grad(tensor)
                outputs, extras = func(*inner)
                eager_transforms.assert_non_empty_tensor_output([*outputs], "vjp(f, *primals)")
                return _below(outputs, level), _below(extras, level)
        finally:
            _functorch._grad_decrement_nesting()


def at_forward_level(
    func: LeafFunction, primals: Leaves, tangents: Leaves
) -> tuple[Leaves, Leaves, Leaves]:
    """Outputs, their tangents and extras at a new forward level, as in ``torch.func.jvp``."""
    level = eager_transforms.enter_jvp_nesting()
    try:
        is_first = eager_transforms.JVP_NESTING == 1
        plain = forward_ad.dual_level() if is_first else nullcontext()
        with forward_ad._set_fwd_grad_enabled(True), plain:
            pairs = zip(primals, tangents, strict=True)
            with untracked():
                duals = [forward_ad.make_dual(x, v) for x, v in pairs]
            outputs, extras = func(*duals)
            with untracked():
                unpacked = [eager_transforms.safe_unpack_dual(out, strict=False) for out in outputs]
            values, products = zip(*unpacked, strict=True)
            return _below(values, level), _below(products, level), _below(extras, level)
    finally:
        eager_transforms.exit_jvp_nesting()


def pushed_product(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``func(x, w, bias, …)`` in forward mode, for a product of two factors, linear in each.

    Where one factor has no tangent, torch multiplies the other by zeros, which takes half as long
    as the value and the tangent that is there.
    """
    x, w, *others = args
    bias, *rest = others or [None]
    level, tensors = _functorch.peek_interpreter_stack(), (x, w) if bias is None else (x, w, bias)
    # a vmap inside hides the tangents; under one of samples outside, nobody could write into it
    is_pushed = level is not None and level.key() == TransformType.Jvp
    if not is_pushed or not are_plain(tensors) or any(map(is_batched, tensors)):
        return func(*args)
    (x, pushed_x), (w, pushed_w) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(w)
    if (pushed_x is None) == (pushed_w is None):
        return func(*args)
    pushed = (pushed_x, w) if pushed_w is None else (x, pushed_w)
    bias, pushed_bias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    dual = forward_ad.make_dual(func(x, w, bias, *rest), func(*pushed, pushed_bias, *rest))
    # a write into a view would push to what it is a view of, which has no tangent
    return torch.ops.aten._unsafe_view(dual, dual.shape)


def _below(leaves: Leaves, level: int) -> Leaves:
    """The leaves without the wrappers of this level."""
    return tuple([_functorch._unwrap_for_grad(leaf, level) for leaf in leaves])
