"""Evaluates a function at a level of derivatives of its own, without the trees of torch.func.

The trees of torch.func cost as much as a small evaluation. A compiler can trace torch.func alone.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from jacfunc._torch.autograd import untracked
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


def _below(leaves: Leaves, level: int) -> Leaves:
    """The leaves without the wrappers of this level."""
    return tuple([_functorch._unwrap_for_grad(leaf, level) for leaf in leaves])
