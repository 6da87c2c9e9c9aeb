"""A pullback of ours, seen from inside: is it the innermost derivative?"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType


def innermost_level() -> int | None:
    """Of the transform that sees operations first."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else int(top.level())


def is_right_twice(level: int | None) -> bool:
    """Is a pullback of ours, at this level of functorch or on a plain graph, the innermost?

    It loops where torch's second derivative is wrong under vmap; a vmap between it and the
    derivative outside does not.
    """
    stack = _functorch.get_interpreter_stack() or []
    if level is None or not stack:
        return level is None and not stack
    keys = [interpreter.key() for interpreter in stack]
    first = next(i for i, key in enumerate(keys) if key != TransformType.Vmap)
    is_ours = keys[-1] == TransformType.Grad and stack[-1].level() == level
    return is_ours and TransformType.Vmap not in keys[first:]


@dataclass(slots=True)
class Pull:
    """What is watched for: a pullback of ours.

    Args:
        level: of functorch; None on a plain graph.
        around: what tells whether it is differentiated further.
        leads_out: of a plain graph: is what leads to a tensor differentiated further outside?
    """

    level: int | None
    around: Hashable
    leads_out: Callable[[Tensor], bool] | None = None
