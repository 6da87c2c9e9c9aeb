"""Walks through autograd graphs: what they are made of, and where they lead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._faults import suspects
from jacfunc._functorch import below_transforms


@dataclass(slots=True)
class Graph:
    """From tensors back to where it is cut off.

    Args:
        nodes: kinds of the autograd nodes that may be wrong.
        met: those of the starts, and of what is looked for, that a path leads to, and from where;
            None is a tensor itself.
        leads_out: does a path lead to a leaf beside them?
    """

    nodes: set[Any]
    met: dict[Any, set[Any]]
    leads_out: bool

    @property
    def names(self) -> set[str]:
        """Of the kinds of nodes."""
        return {node.__name__ for node in self.nodes}

    @classmethod
    def back_to(cls, starts: set[Any], tensors: Iterable[Tensor]) -> Graph:
        """Without the starts that are met: of these nobody asks, and it takes half the time."""
        seen: set[Any] = {None, *starts}
        kinds, outside = set(), False
        pending: list[Any] = list({tensor.grad_fn for tensor in tensors} - seen)
        seen.update(pending)
        while pending:
            node = pending.pop()
            kinds.add(type(node))
            edges = node.next_functions
            for below, _ in edges:
                if below not in seen:
                    seen.add(below)
                    pending.append(below)
            outside = outside or (not edges and hasattr(node, "variable"))
        return cls(suspects(kinds), {}, outside)

    @classmethod
    def of(
        cls, tensors: Iterable[Tensor], starts: set[Any], sought: Set[Any] = frozenset()
    ) -> Graph:
        seen: set[Any] = {None}
        kinds, outside = set(), False
        met: dict[Any, set[Any]] = {}
        pending: list[Any] = [(tensor.grad_fn, None) for tensor in tensors]
        while pending:
            node, above = pending.pop()
            is_start = node in starts
            if is_start or node in sought:
                met.setdefault(node, set()).add(above)
            if is_start or node in seen:
                continue
            seen.add(node)
            kinds.add(type(node))
            edges = node.next_functions
            pending += [(below, node) for below, _ in edges]
            outside = outside or (not edges and hasattr(node, "variable"))
        return cls(suspects(kinds), met, outside)


def leading_out(starts: set[Any], wanted: bool, further: bool) -> Callable[[Tensor], bool]:
    """Of tensors of a call: does a derivative that is kept lead to what is outside?

    Args:
        wanted: is a graph kept of what comes out?
        further: do the primals themselves lead further?
    """
    seen: set[Any] = set()
    found = further

    def leads_out(tensor: Tensor) -> bool:
        nonlocal found
        seen.update(starts, [None])
        pending: list[Any] = [below_transforms(tensor).grad_fn] if wanted else []
        while pending and not found:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += [below for below, _ in node.next_functions]
                found = hasattr(node, "variable")
        return found

    return leads_out


def nodes_of_call(tensor: Tensor, ends: set[Any]) -> set[Any]:
    """Those below the last node of the call that a tensor came out of, with the ends.

    The ends are younger than whatever else went into the call.
    """
    first = min(end._sequence_nr() for end in ends)
    found = set(ends)
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        below = [edge[0] for edge in pending.pop().next_functions]
        new = [n for n in below if n is not None and n not in found and n._sequence_nr() > first]
        found.update(new)
        pending += new
    return found
