"""Attention, opened: its projections are linear layers, of all or some of a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import functional as F

from jacfunc.layers._rules import opening


def unhidden(composite: Any) -> Callable[..., Any]:
    """The same function, without asking first whether a mode would like to see it as a whole."""
    names = {**composite.__globals__, "has_torch_function": lambda tensors: False}
    twin = FunctionType(
        composite.__code__,
        names,
        composite.__name__,
        composite.__defaults__,
        composite.__closure__,
    )
    twin.__kwdefaults__ = composite.__kwdefaults__
    return twin


opening(F.multi_head_attention_forward)(unhidden(F.multi_head_attention_forward))
