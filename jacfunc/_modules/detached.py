"""A warning where a result without a graph seems to be meant for a loss."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from jacfunc._lending import ModuleState
from jacfunc._modules.inputs import POSITIONS
from jacfunc._remembered import Remembered
from jacfunc._torch import is_outermost
from jacfunc._trees import Arguments
from jacfunc._types import Argnums

STACK_LEVEL = 3
"""The caller of the function that calls :func:`warn_if_followed`."""


@cache
def _versions() -> Remembered[int]:
    """The version of a parameter of each module, as it was at the last call."""
    return Remembered()


def warn_if_followed(api: str, state: ModuleState, arguments: Arguments, argnums: Argnums) -> None:
    """Warn, where gradients are on, of two signs that the detached result is used in a loss.

    An input comes out of other computations that require gradients; or the result is by inputs, and
    the module in training has other parameters than at the last call.
    """
    if not (torch.is_grad_enabled() and is_outermost()):
        return
    args, kwargs = arguments
    sign = ""
    if any(getattr(x, "grad_fn", None) is not None for x in (*args, *kwargs.values())):
        sign = "an input that was computed with gradients"
    elif argnums != POSITIONS["params"] and state.module.training and _has_changed(state):
        sign = "parameters that were trained since the last call"
    if sign:
        warnings.warn(
            f"{api}: create_graph must be True where a loss is to train by the result, which is "
            f"detached otherwise, got False with {sign}. Pass create_graph=True, or call it under "
            "torch.no_grad() if nothing is to train by it.",
            stacklevel=STACK_LEVEL,
        )


def _has_changed(state: ModuleState) -> bool:
    """Was the first parameter written to since the last call?"""
    name, param = next(iter(state.point.items()), ("", None))
    if param is None or param.is_inference():
        return False
    before = _versions().get(state.module, name)
    _versions().put(state.module, name, param._version)
    return before is not None and before != param._version
