"""Opens multi-head attention, whose projections are linear layers."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import functional as F

from jacfunc.layers._rules import opening


def without_override(composite: Any) -> Callable[..., Any]:
    """A copy of a function of torch that function modes see inside of, not as one operation."""
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


opening(F.multi_head_attention_forward)(without_override(F.multi_head_attention_forward))
