"""Evaluates a function at a level of derivatives of its own, without the trees of torch.func.

The trees of torch.func cost as much as a small evaluation. A compiler can trace torch.func alone.
Some products are differentiated here in fewer steps, or faster ones, than by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from jacfunc._arguments import are_plain
from jacfunc._torch.autograd import all_modes, untracked
from jacfunc._torch.levels import is_batched, is_recorded_plainly
from jacfunc._torch.vmap import LARGE_PRODUCT, fast_linear, is_for_onednn
from jacfunc._types import LeafFunction, Leaves

SEEDS = 8
"""A product may be taken by oneDNN if so many cotangents at once would make it large."""

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


class _PulledLinear(torch.autograd.Function):
    """``F.linear``, which multiplies cotangents by the weight as :func:`fast_linear` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        out = torch.nn.functional.linear(x, weight, bias)
        with untracked():  # nobody could write into a view
            return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangent is None:
            return None, None, None
        weight, x = ctx.saved_tensors
        if ctx.needs_input_grad == (True, False, False):
            return fast_linear(cotangent, weight.t()), None, None
        # a parameter has an edge even where nobody asks for its rows, which take most of the work
        is_asked = torch._C._will_engine_execute_node
        asked = [node is not None and is_asked(node) for node, _ in ctx.next_functions]
        of_x, of_weight, of_bias, *_ = *asked, False
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        return (
            fast_linear(cotangent, weight.t()) if of_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def pulled_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, of which cotangents are pulled back, by oneDNN where that is faster."""
    with untracked():
        is_pulled = _is_pulled(input, weight, bias)
    by: Callable[..., Tensor] = _PulledLinear.apply if is_pulled else torch.nn.functional.linear
    return by(input, weight, bias)


def _is_pulled(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Is it a large product that is differentiated, and does nobody else look?

    What is saved for the backward pass is not what torch saves, and what runs is not its operation.
    """
    return (
        type(x) is Tensor
        and x.requires_grad
        and x.dim() > 1
        and weight.dim() == 2
        and x.numel() * weight.shape[0] >= LARGE_PRODUCT // SEEDS
        and is_for_onednn(x, weight)
        and all(map(_is_inside, (x, weight) if bias is None else (x, weight, bias)))
        and torch.is_grad_enabled()
        and not torch._C._is_any_autocast_enabled()
        and is_recorded_plainly()
        and all(getattr(mode, "lets_products_pass", False) for mode in all_modes())
    )


def _is_inside(tensor: Tensor) -> bool:
    """Is it plain, and no leaf of a graph? Of leaves nobody can tell whether rows are asked for."""
    return are_plain((tensor,)) and tensor.requires_grad == (tensor.grad_fn is not None)


PULLED: dict[Callable[..., Any], Callable[..., Any]] = {torch.nn.functional.linear: pulled_linear}
"""What stands for an operation, where a function is evaluated to pull cotangents back."""


def _below(leaves: Leaves, level: int) -> Leaves:
    """The leaves without the wrappers of this level."""
    return tuple([_functorch._unwrap_for_grad(leaf, level) for leaf in leaves])
