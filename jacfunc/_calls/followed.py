"""A warning where a result without a graph seems to be meant for a loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from jacfunc._faults import is_watching
from jacfunc._remembered import Remembered
from jacfunc._torch import is_outermost
from jacfunc._trees import Arguments

CUT_OFF = (
    "{api}: inside another derivative the result must keep its graph, got create_graph=False, "
    "whose derivative would be zero. Pass create_graph=True."
)
STACK_LEVEL = 3
"""The caller of the function that calls :func:`warn_if_followed`."""


@cache
def _versions() -> Remembered[tuple[int, int]]:
    """The identity and version of a parameter of each module, as they were at the last call."""
    return Remembered()


def warn_if_followed(
    api: str, module: nn.Module, params: Mapping[str, Tensor], arguments: Arguments, by_inputs: bool
) -> None:
    """Warn, where gradients are on, of two signs that the detached result is used in a loss.

    An input comes out of other computations that require gradients; or the result is by inputs, and
    the module in training has other parameters than at the last call.

    Raises:
        ValueError: with such an input in a function of which another derivative is taken.
    """
    if not torch.is_grad_enabled():
        return
    args, kwargs = arguments
    has_graph = False
    for x in (*args, *kwargs.values()):
        has_graph = has_graph or getattr(x, "grad_fn", None) is not None
    # TorchScript that was frozen has no mode
    is_trained = by_inputs and getattr(module, "training", False)
    if not (has_graph or is_trained) or not is_outermost():
        return
    if has_graph and is_watching():
        raise ValueError(CUT_OFF.format(api=api))
    sign = "an input that was computed with gradients"
    if not has_graph:
        if not _has_changed(module, params):
            return
        sign = "parameters that were trained since the last call"
    warnings.warn(
        f"{api}: create_graph must be True where a loss is to train by the result, which is "
        f"detached otherwise, got False with {sign}. Pass create_graph=True, or call it under "
        "torch.no_grad() if nothing is to train by it.",
        stacklevel=STACK_LEVEL,
    )


def _has_changed(module: nn.Module, params: Mapping[str, Tensor]) -> bool:
    """Was the first parameter written into, or replaced, since the last call of the module?"""
    for name, param in params.items():
        if param.is_inference():
            return False
        now = id(param), param._version
        before = _versions().get(module, name)
        if before != now:
            _versions().put(module, name, now)
        return before is not None and before != now and before[0] == now[0]
    return False
