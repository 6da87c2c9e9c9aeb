"""A function evaluated at jets: value, first and second derivatives of one evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jacfunc._forward_laplacian.jet import Jet, NoRule, Propagation
from jacfunc._forward_laplacian.table import RULES
from jacfunc._types import LeafFunction, Leaves


class Derivatives(NamedTuple):
    """Outputs ``[*out_i]``, their first derivatives ``[N, *out_i]`` and second derivatives.

    The second ones are a sum over all N directions, ``[*out_i]``, or each of them, ``[N, *out_i]``.
    """

    outputs: Leaves
    extras: Leaves
    first: Leaves
    second: Leaves


def propagate(
    func: LeafFunction, primals: Leaves, directions: Leaves, is_summed: bool
) -> Derivatives:
    """Value and derivatives along N directions ``[N, *in_j]``, of one evaluation.

    A forward Laplacian (Li et al. 2024, "A computational framework for neural network-based
    variational Monte Carlo with Forward Laplacian", algorithm 1): each operation maps value,
    first derivatives and the sum of second ones to its own.

    Raises:
        NoRule: where an operation has no rule.
    """
    keeps_graph = torch.is_grad_enabled()
    ctx = Propagation(RULES, is_summed, keeps_graph)
    jets = [Jet(ctx, x, v, None) for x, v in zip(primals, directions, strict=True)]
    try:
        with ctx, torch.enable_grad():  # so that a rule sees where the function takes it off
            outputs, extras = func(*jets)
    except Exception:
        if ctx.reason is None:
            raise
    if ctx.reason is not None:  # the function may have caught the refusal
        raise NoRule(ctx.reason)
    if ctx.jets(extras, {}):
        extras = tuple([ctx.value(extra) for extra in extras])
    results = [_derivatives(ctx, out, directions[0].shape[0]) for out in outputs]
    values, firsts, seconds = zip(*results, strict=True) if results else ((), (), ())
    if not keeps_graph:
        values, firsts, seconds = map(_detached, (values, firsts, seconds))
    return Derivatives(values, extras, firsts, seconds)


def _derivatives(ctx: Propagation, out: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value and derivatives of an output; zeros where it is a constant."""
    value = ctx.value(out)
    first = out.first if isinstance(out, Jet) else value.new_zeros((size, *value.shape))
    second = out.second if isinstance(out, Jet) else None
    if second is None:
        second = torch.zeros_like(value if ctx.is_summed else first)
    return value, first, second


def _detached(leaves: Leaves) -> Leaves:
    return tuple([leaf.detach() for leaf in leaves])
