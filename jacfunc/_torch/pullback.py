"""Tells, from inside a function, what is around: modes, and whose derivative is innermost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType


def innermost_level() -> int | None:
    """The level of the transform that sees operations first."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else int(top.level())


def is_right_twice(level: int | None) -> bool:
    """Is jacfunc's pullback, at this level of functorch or on a plain graph, innermost?

    Then second derivatives are right: it goes row by row where torch's second derivative is wrong
    under vmap. A vmap between it and the derivative outside does not.
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
    """The pullback for which a function is evaluated.

    Args:
        level: the level of functorch; None on a plain graph.
        around: equal for pullbacks that are differentiated further in the same way.
        leads_out: on a plain graph, tells whether the graph of a tensor leads to leaves outside,
            by which it may be differentiated further.
        order: how many derivatives it takes: two where its product is pulled back, too.
    """

    level: int | None
    around: Hashable
    leads_out: Callable[[Tensor], bool] | None = None
    order: int = 1

    running_node: ClassVar[Callable[[], Any]] = torch._C._current_autograd_node
    """The node of a graph whose backward pass runs; None outside of backward passes."""


def nodes_behind(nodes: Iterable[Any], ends: Iterable[Any] = ()) -> Iterator[Any]:
    """Nodes of a graph, and all nodes behind them up to the ends, each once; without the ends."""
    pending, visited = list(nodes), {None, *ends}
    while pending:
        node = pending.pop()
        if node not in visited:
            visited.add(node)
            yield node
            pending += [below for below, _ in node.next_functions]


def dtypes_of(node: Any) -> list[torch.dtype]:
    """The dtypes of what a node of a graph gets in a backward pass."""
    return [metadata.dtype for metadata in node._input_metadata]
