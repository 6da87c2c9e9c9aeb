"""A trace that runs: forward alone, or with a trace of its pullback behind it."""

from __future__ import annotations

import time
from collections.abc import Collection
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from jacfunc._compiled.backends import Compiler, Run
from jacfunc._compiled.passes import MOVES, simplified
from jacfunc._compiled.traced import in_our_words
from jacfunc._memory import PeakBytes
from jacfunc._types import Leaves


class Executable:
    """A graph, compiled at its first run.

    Args:
        graph: takes inputs.
        inputs: tensors like which all later ones are.
        num_args: so many of them are arguments; all others stay in place from call to call.
        compiler: makes it run.
    """

    def __init__(
        self, graph: GraphModule, inputs: Leaves, num_args: int, compiler: Compiler
    ) -> None:
        with in_our_words():
            self.graph, self._constants = simplified(graph, inputs)
        nodes = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        self.used: list[int] = []
        for number, node in enumerate(nodes[: len(inputs)]):
            if node.users:
                self.used.append(number)
            else:
                self.graph.graph.erase_node(node)
        self.graph.recompile()
        self._num_args = sum(number < num_args for number in self.used)
        self._takes_graphs = any(inputs[number].requires_grad for number in self.used)
        self._compiler, self._lock = compiler, Lock()
        self._run: Run | None = None
        self.compile_seconds = 0.0

    def flops(self, inputs: Leaves) -> int:
        """How many operations products of matrices, convolutions and attention take."""
        with FlopCounterMode(display=False) as counter:
            self.replayed(inputs)
        return int(counter.get_total_flops())

    def replayed(self, inputs: Leaves) -> Any:
        """The outputs, operator by operator."""
        with torch.no_grad():
            return self.graph.forward(*self.taken(inputs))

    def taken(self, inputs: Leaves) -> Leaves:
        """What the graph takes: those inputs that it uses, and constants."""
        return (*[inputs[number] for number in self.used], *self._constants)

    @property
    def constant_bytes(self) -> int:
        """Bytes of what was computed at the trace, and is kept."""
        return sum(x.nbytes for x in self._constants)

    def peak_bytes(self, inputs: Leaves) -> int:
        """Bytes of all tensors at once in a run operator by operator, without the inputs."""
        taken = [inputs[number] for number in self.used]
        with torch.no_grad(), PeakBytes() as counter:
            self.graph.forward(*taken, *self._constants)
        return int(counter.peak)

    def __call__(self, inputs: Leaves) -> Any:
        """The outputs, without a graph."""
        taken = [inputs[number] for number in self.used]
        run = self._run or self._compiled(taken)
        if self._takes_graphs and torch.is_grad_enabled():
            with torch.no_grad():
                return run(*taken, *self._constants)
        return run(*taken, *self._constants)

    def _compiled(self, inputs: list[Tensor]) -> Run:
        """What runs it; other threads wait for the one that compiles."""
        with self._lock:
            if self._run is None:
                start = time.perf_counter()
                detached = tuple([x.detach() for x in (*inputs, *self._constants)])
                with torch.no_grad():
                    self._run = self._compiler(self.graph, detached, self._num_args)
                self.compile_seconds = time.perf_counter() - start
        return self._run


class Divided:
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
        return self.of(inputs, self.at(inputs))

    def peak_bytes(self, inputs: Leaves) -> int:
        """Bytes of all tensors at once in a run of both, operator by operator."""
        return self._whole.peak_bytes(inputs)

    @property
    def compile_seconds(self) -> float:
        """Seconds of both compilations."""
        return self.before.compile_seconds + self.after.compile_seconds

    @property
    def constant_bytes(self) -> int:
        """Bytes of what both keep from point to point."""
        return self.before.constant_bytes + self.after.constant_bytes

    @property
    def graph(self) -> GraphModule:
        """The graph of what is run for each product."""
        return self.after.graph


class Differentiable:
    """An executable whose outputs are differentiated by another one.

    Args:
        forward: returns the outputs.
        backward: takes the inputs and a cotangent for each floating output, and returns what is
            pulled back onto those inputs that require gradients.
        receives: which inputs these are.
    """

    def __init__(self, forward: Executable, backward: Executable, receives: list[bool]) -> None:
        self.forward, self.backward, self.receives = forward, backward, receives

    @property
    def compile_seconds(self) -> float:
        """Seconds of both compilations, so far as they were needed."""
        return self.forward.compile_seconds + self.backward.compile_seconds

    @property
    def constant_bytes(self) -> int:
        """Bytes of what both keep."""
        return self.forward.constant_bytes + self.backward.constant_bytes

    def peak_bytes(self, inputs: Leaves) -> int:
        """Bytes of all tensors at once in a run forward."""
        return self.forward.peak_bytes(inputs)

    @property
    def graph(self) -> GraphModule:
        """The graph of the outputs."""
        return self.forward.graph

    def __call__(self, inputs: Leaves) -> Any:
        """The outputs, with a graph."""
        return _Pair.apply(self, *inputs)


class _Pair(torch.autograd.Function):
    """Two executables as one function of torch's autograd."""

    @staticmethod
    def forward(ctx: Any, pair: Differentiable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.pair = pair
        ctx.save_for_backward(*inputs)
        outputs = tuple(pair.forward(inputs))
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's own decorator for it lets some derivatives pass
            raise NotImplementedError(
                "compile: a compiled derivative must be differentiated once at most, got "
                "create_graph=True. Call the derivative as it is, or compile the gradient."
            )
        floating = [u for u in cotangents if u.is_floating_point()]
        pulled = iter(ctx.pair.backward((*ctx.saved_tensors, *[u.contiguous() for u in floating])))
        return None, *[next(pulled) if receives else None for receives in ctx.pair.receives]


def _divided(
    graph: GraphModule, free: Collection[Node]
) -> tuple[GraphModule, GraphModule, list[int]]:
    """A graph as two: of all that depends on no ``free`` input, and of the rest.

    Views are taken again by the second: they cost nothing, and to keep them would keep copies.

    The first takes all inputs, the second the free ones and what is kept. The numbers say which
    input each of that is, or, behind the inputs, which output of the first.
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
