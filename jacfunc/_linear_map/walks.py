"""Walks through autograd graphs: the kinds of nodes in them, and the leaves that they lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._faults import suspects
from jacfunc._torch import below_transforms


@dataclass(slots=True)
class Graph:
    """What a walk from tensors back to the start nodes of a call has met.

    Args:
        nodes: kinds of the autograd nodes on the way that may be wrong.
        met: each start node, and each node that was looked for, that a path leads to; with the
            nodes that the paths come from, or None for a tensor itself.
        leads_out: does a path lead to a leaf outside of the call?
    """

    nodes: set[Any]
    met: dict[Any, set[Any]]
    leads_out: bool

    @property
    def names(self) -> set[str]:
        """Names of the kinds of nodes."""
        return {node.__name__ for node in self.nodes}

    @classmethod
    def back_to(cls, starts: set[Any], tensors: Iterable[Tensor]) -> Graph:
        """A walk that does not note which starts it meets, in half the time of :meth:`of`."""
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
        """A walk that notes the starts, and the nodes that are sought, wherever it meets one."""
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


def leading_out(starts: set[Any], grad_mode: bool, is_further: bool) -> Callable[[Tensor], bool]:
    """A test of tensors inside a call: does a derivative that is kept lead out of the call?

    Args:
        starts: nodes at which the call begins.
        grad_mode: is a graph kept of the outputs?
        is_further: do the primals themselves have a graph, so that the answer is always yes?
    """
    seen: set[Any] = set()
    has_left = is_further

    def leads_out(tensor: Tensor) -> bool:
        nonlocal has_left
        seen.update(starts, [None])
        pending: list[Any] = [below_transforms(tensor).grad_fn] if grad_mode else []
        while pending and not has_left:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += [below for below, _ in node.next_functions]
                has_left = hasattr(node, "variable")
        return has_left

    return leads_out


def nodes_of_call(tensor: Tensor, ends: set[Any]) -> set[Any]:
    """Nodes of the call that made a tensor: from below the tensor's own down to the ends.

    The ends are copies made for the call, so whatever else went into it is older: the walk stops
    at older nodes.
    """
    first = min(end._sequence_nr() for end in ends)
    nodes = set(ends)
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        below = [edge[0] for edge in pending.pop().next_functions]
        new = [n for n in below if n is not None and n not in nodes and n._sequence_nr() > first]
        nodes.update(new)
        pending += new
    return nodes
