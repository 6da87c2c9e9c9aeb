"""A trace as two: what depends on the point alone, and what is run for each product."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from jacfunc._traces.backends import Compiler
from jacfunc._traces.executable import Executable, InTwo
from jacfunc._traces.passes import MOVES
from jacfunc._types import Leaves


class Divided(InTwo):
    """An executable as two: the first is run once for each point, the second for what is free.

    Args:
        whole: what is divided.
        inputs: tensors like which all later inputs of it are.
        free: which of these are not fixed at a point.
        compiler: makes both run.
    """

    def __init__(self, whole: Executable, inputs: Leaves, free: range, compiler: Compiler) -> None:
        self._whole, self._free = whole, free
        names = [node for node in whole.graph.graph.nodes if node.op == "placeholder"]
        self._taken = [number for number in whole.used if number in free]
        of_free = [n for n, number in zip(names, whole.used, strict=False) if number in free]
        before, after, self._sources = _divided(whole.graph, of_free)
        values = whole.taken(inputs)
        with torch.no_grad():  # nothing is compiled yet
            computed = before.forward(*values)
        self.before = Executable(before, values, len(values), compiler)
        kept = self._chosen((*values, *computed))
        chosen = tuple([inputs[number] for number in self._taken])
        self.after = Executable(after, (*chosen, *kept), len(chosen), compiler)
        super().__init__(self.before, self.after)

    def at(self, inputs: Leaves) -> Leaves:
        """What the second takes of a point; of the free inputs no number is read."""
        values = self._whole.taken(inputs)
        is_computed = max(self._sources, default=0) >= len(values)
        return self._chosen((*values, *self.before(values)) if is_computed else values)

    def _chosen(self, everything: Leaves) -> Leaves:
        return tuple([everything[number] for number in self._sources])

    def of(self, inputs: Leaves, kept: Leaves, is_replayed: bool = False) -> Any:
        """The outputs, of free inputs at a point."""
        taken = (*[inputs[number] for number in self._taken], *kept)
        return self.after.replayed(taken) if is_replayed else self.after(taken)

    def __call__(self, inputs: Leaves) -> Any:
        """The outputs, of both."""
        return self.of(inputs, self.at(inputs))

    def peak_bytes(self, inputs: Leaves) -> int:
        """Bytes of all tensors at once in a run of both, operator by operator."""
        return self._whole.peak_bytes(inputs)

    @property
    def graph(self) -> GraphModule:
        """The graph of what is run for each product."""
        return self.after.graph


def _divided(
    graph: GraphModule, free: Collection[Node]
) -> tuple[GraphModule, GraphModule, list[int]]:
    """A graph as two: of all that depends on no ``free`` input, and of the rest.

    Views are taken again by the second: they cost nothing, and to keep them would keep copies.

    Returns:
        What takes all inputs; what takes the free ones, and then what is kept; and, for each tensor
        that is kept, which input it is, or, behind the inputs, which output of the first.
    """
    nodes = [*graph.graph.nodes]
    inputs = [node for node in nodes if node.op == "placeholder"]
    depends, places = set(free), [*inputs]
    for node in nodes:
        if node.op == "output" or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    ends = [_viewed(n) for node in nodes if node in depends for n in node.all_input_nodes]
    kept = [*dict.fromkeys(n for n in ends if n not in depends and n.op != "get_attr")]
    places += [node for node in kept if node.op != "placeholder"]

    first = Graph()
    copies = {node: first.node_copy(node) for node in inputs}
    for node in nodes:
        if node not in depends and node not in copies:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(tuple([copies[node] for node in places[len(inputs) :]]))

    second = Graph()
    copies = {node: second.placeholder(node.name) for node in (*free, *kept)}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)

    def in_second(node: Node) -> Node:
        if node not in copies:
            copies[node] = second.node_copy(node, in_second)
        return copies[node]

    for node in nodes:
        if node in depends:
            in_second(node)
    modules = GraphModule(graph, first), GraphModule(graph, second)
    return *modules, [places.index(node) for node in kept]


def _viewed(node: Node) -> Node:
    """What a node is a view of, by whatever many views."""
    while node.target in MOVES:
        node = node.all_input_nodes[0]
    return node
