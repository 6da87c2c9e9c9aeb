"""A trace that runs: forward alone, or with a trace of its pullback behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from jacfunc._memory import PeakBytes
from jacfunc._rounding import agree
from jacfunc._torch import Graphs, uncast
from jacfunc._traces.backends import Compiler, Run
from jacfunc._traces.passes import simplified
from jacfunc._traces.tape import written_down
from jacfunc._traces.traced import in_our_words
from jacfunc._types import Leaves

FEWEST_CALLS = 16
"""So many calls of a kind pay for writing down what they do."""

MOST_MISSES = 3
"""After so many calls that had to be taken anew, a kind of call is no more tried so."""


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
        return uncast(self.graph.forward, True, *self.taken(inputs))

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
        taken = [*map(inputs.__getitem__, self.used)]  # no comprehension: as small calls are many
        run = self._run or self._compiled(taken)
        return uncast(run, self._takes_graphs, *taken, *self._constants)

    def _compiled(self, inputs: list[Tensor]) -> Run:
        """What runs it; other threads wait for the one that compiles."""
        with self._lock:
            if self._run is None:
                start = time.perf_counter()
                taken = *inputs, *self._constants
                detached = tuple([x.detach() if isinstance(x, Tensor) else x for x in taken])
                with torch.no_grad():
                    self._run = self._compiler(self.graph, detached, self._num_args)
                self.compile_seconds = time.perf_counter() - start
        return self._run


class WrittenWork:
    """A work that reads nothing but its sources, as operators that run one after the other.

    Args:
        work: is done once, to be written down.
        sources: all tensors that it gets from outside.
        owners: of its steps with code of a user's.

    Raises:
        Nameless: if it can't be written down.
    """

    def __init__(
        self, work: Callable[[], Leaves], sources: Leaves, owners: Sequence[Any] = ()
    ) -> None:
        graph = written_down(work, sources, owners)
        detached = tuple([source.detach() for source in sources])
        self._executable = Executable(graph, (*detached, *owners), 0, Compiler("replay"))
        # the tape knows tensors by where they lie in memory, so two at one place count as one
        self._aliases = _repeated([*map(Tensor.data_ptr, sources)])
        self.hold_for(sources)

    def hold_for(self, sources: Leaves) -> None:
        """From now on it holds for sources of the kinds of these, under the settings of now."""
        self._count, self._repeated = len(sources), _repeated(list(map(id, sources)))
        # torch's guard refuses to get a tensor twice
        self._once = [number for number in range(self._count) if number not in self._repeated]
        self._are_alike = Graphs.guard_of_tensors(tuple([sources[n] for n in self._once]))
        self._are_settings = Graphs.guard_of_settings()

    def result(self, sources: Leaves, owners: Sequence[Any] = ()) -> Leaves | None:
        """What the work makes of these sources; None if it does not hold for them."""
        if len(sources) != self._count:
            return None
        for number, first in self._repeated.items():
            if sources[number] is not sources[first]:
                return None
        once = map(sources.__getitem__, self._once)
        if not (self._are_alike(*once) and self._are_settings()):
            return None
        places = [*map(Tensor.data_ptr, sources)] if self._aliases else []
        for number, first in self._aliases.items():
            if places[number] != places[first]:
                return None
        return tuple(self._executable((*sources, *owners)))

    def gives(self, sources: Leaves, expected: Leaves) -> bool:
        """Does it make of these sources what is expected, but for rounding?"""
        result = self.result(sources)
        return result is not None and agree(result, expected)


class InTwo:
    """Two executables that serve one function, and what both have cost."""

    def __init__(self, first: Executable, second: Executable) -> None:
        self._both = first, second

    @property
    def compile_seconds(self) -> float:
        """Seconds of both compilations, so far as they were needed."""
        return sum(each.compile_seconds for each in self._both)

    @property
    def constant_bytes(self) -> int:
        """Bytes of what both keep from call to call."""
        return sum(each.constant_bytes for each in self._both)


class Differentiable(InTwo):
    """An executable whose outputs are differentiated by another one.

    Args:
        forward: returns the outputs.
        backward: takes the inputs and a cotangent for each floating output, and returns what is
            pulled back onto those inputs that require gradients.
        receives: which inputs these are.
    """

    def __init__(self, forward: Executable, backward: Executable, receives: list[bool]) -> None:
        super().__init__(forward, backward)
        self.forward, self.backward, self.receives = forward, backward, receives

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


def _repeated(marks: Sequence[int]) -> dict[int, int]:
    """Numbers of marks that equal an earlier one, with the number of that."""
    first: dict[int, int] = {}
    numbers = {n: first.setdefault(mark, n) for n, mark in enumerate(marks)}
    return {n: earlier for n, earlier in numbers.items() if n != earlier}
