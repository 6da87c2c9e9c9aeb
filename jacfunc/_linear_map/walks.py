"""Walks through autograd graphs: the kinds of nodes in them, and the leaves that they lead to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from math import prod
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from jacfunc._torch import below_transforms

_SEQUENCE = methodcaller("_sequence_nr")


@dataclass(slots=True)
class Graph:
    """What a walk from tensors back to the start nodes of a call has met.

    Args:
        nodes: kinds of the autograd nodes on the way.
        met: each start node, and each node that was looked for, that a path leads to; with the
            nodes that the paths come from, or None for a tensor itself.
        leads_out: does a path lead to a leaf outside of the call?
    """

    nodes: set[Any]
    met: dict[Any, set[Any]]
    leads_out: bool

    @classmethod
    def back_to(cls, starts: set[Any], tensors: Iterable[Tensor]) -> Graph:
        """A walk that does not note which starts it meets, in half the time of :meth:`of`."""
        visited: set[Any] = {None, *starts}
        kinds, outside = set(), False
        pending: list[Any] = list({tensor.grad_fn for tensor in tensors} - visited)
        visited.update(pending)
        while pending:
            node = pending.pop()
            kinds.add(type(node))
            edges = node.next_functions
            for below, _ in edges:
                if below not in visited:
                    visited.add(below)
                    pending.append(below)
            outside = outside or (not edges and hasattr(node, "variable"))
        return cls(kinds, {}, outside)

    @classmethod
    def of(
        cls, tensors: Iterable[Tensor], starts: set[Any], sought: Set[Any] = frozenset()
    ) -> Graph:
        """A walk that notes the starts, and the nodes that are sought, wherever it meets one."""
        visited: set[Any] = {None}
        kinds, outside = set(), False
        met: dict[Any, set[Any]] = {}
        pending: list[Any] = [(tensor.grad_fn, None) for tensor in tensors]
        while pending:
            node, above = pending.pop()
            is_start = node in starts
            if is_start or node in sought:
                met.setdefault(node, set()).add(above)
            if is_start or node in visited:
                continue
            visited.add(node)
            kinds.add(type(node))
            edges = node.next_functions
            for below, _ in edges:
                pending.append((below, node))
            outside = outside or (not edges and hasattr(node, "variable"))
        return cls(kinds, met, outside)


@dataclass(slots=True)
class Paths:
    """The nodes on all paths from some tensors back to others, in a graph of the user's.

    A walk such as :class:`Graph` stops at its starts. Here one start may lie behind another, and
    what lies behind all of them is no part of the sweep.

    Args:
        nodes: those on the way, without the ends that nothing lies behind.
        met: for each end, does a path lead there?
    """

    nodes: set[Any]
    met: list[bool]

    @classmethod
    def between(cls, tensors: Iterable[Tensor], ends: Sequence[Tensor]) -> Paths:
        """The paths from tensors that have a graph to the ends."""
        above: dict[Any, list[tuple[int, Any]]] = {}
        leaves: dict[int, Any] = {}
        edges = [(node, number, None) for node, number, *_ in map(get_gradient_edge, tensors)]
        pending: list[Any] = []
        while edges or pending:
            for below, number, node in edges:
                if below in above:
                    above[below].append((number, node))
                elif below is not None:
                    above[below] = [(number, node)]
                    pending.append(below)
            edges = []
            if pending:
                node = pending.pop()
                edges = [(below, number, node) for below, number in node.next_functions]
                if not edges and hasattr(node, "variable"):
                    leaves[id(node.variable)] = node
        nodes: set[Any] = set()
        met = []
        for end in ends:
            at = leaves.get(id(end)) if end.is_leaf else end.grad_fn
            edge = end.output_nr
            over = [node for number, node in above.get(at, ()) if number == edge]
            met.append(bool(over))
            while over:
                node = over.pop()
                if node is not None and node not in nodes:
                    nodes.add(node)
                    over += [parent for _, parent in above[node]]
        return cls(nodes, met)

    @property
    def graph(self) -> Graph:
        """The kinds of the nodes, as what is told of a graph."""
        return Graph(set(map(type, self.nodes)), {}, leads_out=True)

    @property
    def nbytes(self) -> int:
        """The bytes of one cotangent at each of the nodes."""
        every = (each for node in self.nodes for each in node._input_metadata)
        return sum(prod(each.shape) * each.dtype.itemsize for each in every)


@dataclass(slots=True)
class LeadsOut:
    """A test of tensors inside a call: does a derivative that is kept lead out of the call?

    Args:
        starts: nodes at which the call begins.
        grad_mode: is a graph kept of the outputs?
        has_left: is the answer always yes, as the primals themselves have a graph?
    """

    starts: Collection[Any]
    grad_mode: bool
    has_left: bool
    _visited: set[Any] = field(default_factory=set)

    def __call__(self, tensor: Tensor) -> bool:
        self._visited.update(self.starts, [None])
        pending: list[Any] = [below_transforms(tensor).grad_fn] if self.grad_mode else []
        while pending and not self.has_left:
            node = pending.pop()
            if node not in self._visited:
                self._visited.add(node)
                pending += [below for below, _ in node.next_functions]
                self.has_left = hasattr(node, "variable")
        return self.has_left


def nodes_of_calls(calls: Iterable[tuple[Any, set[Any]]]) -> list[set[Any]]:
    """Nodes of each call, by the node that its result came out of: from below that to its ends.

    The ends are copies made for the call, so whatever else went into it is older: the walk stops
    at older nodes.
    """
    every = []
    for last, ends in calls:
        first = min(map(_SEQUENCE, ends))
        nodes = set(ends)
        pending: list[Any] = [last]
        while pending:
            for node, _ in pending.pop().next_functions:
                if node is not None and node not in nodes and node._sequence_nr() > first:
                    nodes.add(node)
                    pending.append(node)
        every.append(nodes)
    return every


_OF_SIZES = "size", "stride", "numel", "_saved_N"  # as normalization over groups names samples


def graph_number(tensors: Iterable[Tensor], ends: Iterable[Any]) -> int:
    """Equal for graphs of the same operations with the same plain values, joined in the same way.

    It tells of operations that no mode sees, as those of TorchScript. What was saved as a tensor is
    not looked at: to get it back may run a part of a module again.

    Args:
        ends: nodes at which the walk ends; all else that the tensors were made of counts.
    """
    numbers: dict[Any, int] = dict.fromkeys(ends, -1)
    numbers[None] = 0
    nodes, kinds = list[Any](), list[Any]()

    def note(node: Any, output: int) -> None:
        if node not in numbers:
            nodes.append(node)
            numbers[node] = len(nodes)
        kinds.extend((numbers[node], output))

    for tensor in tensors:
        if tensor.grad_fn is not None:
            note(tensor.grad_fn, tensor.output_nr)
    for node in nodes:  # which grows
        kind: Any = type(node)
        kinds += (kind.__name__,)
        if not isinstance(node, BackwardCFunction) and (values := _plain_values(kind)):
            kinds += (str(values(node)),)  # Python gives -1 and -2 the same hash
        for below in node.next_functions:
            note(*below)
    return hash(tuple(kinds))


@cache
def _plain_values(kind: type) -> Callable[[Any], Any] | None:
    """What reads the values that nodes of a kind never save as tensors, if there are any.

    Sizes are left out: those of a part of a batch are others, and its operations are the same.
    """
    every = set(dir(kind))
    names = [x for x in every if x.startswith("_saved_") and f"_raw{x}" not in every]
    names = [x for x in names if not any(word in x for word in _OF_SIZES)]
    return attrgetter(*sorted(names)) if names else None
