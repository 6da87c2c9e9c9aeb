"""A trace as two: what depends on the point alone, and what is run for each product."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from jacfunc._rounding import agree
from jacfunc._torch import noise_like
from jacfunc._traces.backends import Compiler
from jacfunc._traces.executable import Executable, InTwo
from jacfunc._traces.passes import MOVES
from jacfunc._types import Leaves

OPERATIONS_A_BYTE = 8
"""About as many operations take as long as reading a byte of what is kept."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a point, and what takes it."""

    divided: Divided
    leaves: Leaves

    def __call__(self, inputs: Leaves, is_replayed: bool = False) -> Any:
        """The outputs, of free inputs at the point."""
        return self.divided.of(inputs, self.leaves, is_replayed)


class Divided(InTwo):
    """An executable as two: the first is run once for each point, the second for what is free.

    Args:
        whole: what is divided.
        inputs: tensors like which all later inputs of it are.
        free: which of these are not fixed at a point.
        compiler: makes both run.
        sure: another way to the same answer, which needs less of the function. It is taken at
            points where the numbers are not those of this way.
    """

    def __init__(
        self,
        whole: Executable,
        inputs: Leaves,
        free: range,
        compiler: Compiler,
        sure: Divided | None = None,
    ) -> None:
        self._whole, self._free, self._sure = whole, free, sure
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
        read = sum(x.nbytes for x in kept)
        self.cost = self.after.flops((*chosen, *kept)) + OPERATIONS_A_BYTE * read

    def at(self, inputs: Leaves) -> Kept:
        """What the second takes of a point; of the free inputs no number is read."""
        values = self._whole.taken(inputs)
        is_computed = max(self._sources, default=0) >= len(values)
        leaves = self._chosen((*values, *self.before(values)) if is_computed else values)
        if self._sure is None or self._is_right(inputs, leaves):
            return Kept(self, leaves)
        return self._sure.at(inputs)

    def _is_right(self, inputs: Leaves, kept: Leaves) -> bool:
        """Is the answer at this point, for noise as free inputs, that of the sure way?"""
        assert self._sure is not None
        noisy = [*inputs]
        for number in self._free:
            if inputs[number].is_floating_point():
                noisy[number] = _noise_like(inputs[number])
        expected = self._sure._whole.replayed(tuple(noisy))
        return agree(self.of(tuple(noisy), kept), expected)

    def _chosen(self, everything: Leaves) -> Leaves:
        return tuple([everything[number] for number in self._sources])

    def of(self, inputs: Leaves, kept: Leaves, is_replayed: bool = False) -> Any:
        """The outputs, of free inputs at a point."""
        taken = (*[inputs[number] for number in self._taken], *kept)
        return self.after.replayed(taken) if is_replayed else self.after(taken)

    def __call__(self, inputs: Leaves) -> Any:
        """The outputs, of both."""
        return self.at(inputs)(inputs)

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
    depends = _take_scales_apart(graph, free)
    nodes = [*graph.graph.nodes]
    inputs = [node for node in nodes if node.op == "placeholder"]
    places = [*inputs]
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


_ATEN = torch.ops.aten
_SCALES = frozenset(
    {_ATEN.gelu_backward.default, _ATEN.silu_backward.default, _ATEN.mish_backward.default}
    | {_ATEN.elu_backward.default, _ATEN.softplus_backward.default}
)
"""Operators that multiply a tensor, entry by entry, by a function of others that takes long."""


def _take_scales_apart(graph: GraphModule, free: Collection[Node]) -> set[Node]:
    """Compute such functions of the point alone apart from the products; what depends on ``free``.

    So derivatives of activations are kept of a point, as their values are.
    """
    depends, known = set(free), dict[Any, Node]()
    for node in graph.graph.nodes:
        if node.op != "output" and depends.isdisjoint(node.all_input_nodes):
            continue
        depends.add(node)
        tensors = [x for x in node.args[1:] if isinstance(x, Node)]
        if node.target in _SCALES and depends.isdisjoint(tensors):
            seed, *others = node.args
            key = (node.target, *others, *node.kwargs.items())
            if key not in known:
                with graph.graph.inserting_before(node):
                    ones = graph.graph.call_function(_ATEN.ones_like.default, (tensors[0],))
                    known[key] = graph.graph.call_function(node.target, (ones, *others))
                known[key].kwargs = node.kwargs
            node.target, node.args, node.kwargs = _ATEN.mul.Tensor, (seed, known[key]), {}
    graph.recompile()
    return depends


def _noise_like(x: Tensor) -> Tensor:
    """Noise that lies in memory as the tensor does, as compiled code expects it."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    (noise,) = noise_like((x.new_empty(last + 1 if x.numel() else 0),))
    return noise.as_strided(x.shape, x.stride())


def _viewed(node: Node) -> Node:
    """What a node is a view of, by whatever many views."""
    while node.target in MOVES:
        node = node.all_input_nodes[0]
    return node
