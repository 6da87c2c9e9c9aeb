"""One trace of a function with what it holds for: made at the first call of its kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._compiled.signature import CallArguments, Guard, ResultTree
from jacfunc._errors import Nameless, Refused
from jacfunc._forecasting import Compilation
from jacfunc._log import note
from jacfunc._measuring import seconds_of
from jacfunc._products import from_factors
from jacfunc._rounding import agree
from jacfunc._surroundings import Surroundings
from jacfunc._torch import Graphs, recording, run_backward
from jacfunc._traces import (
    Compiler,
    Differentiable,
    Divided,
    Executable,
    Kept,
    traced,
)
from jacfunc._trees import flatten_containers
from jacfunc._types import Leaves, Tree

MOST_TIMED, ENOUGH = 4, 0.02
"""At most this many runs are timed, and none once they have taken this many seconds."""

Running: TypeAlias = Executable | Differentiable | Divided


class CompiledCall:
    """A compiled kind of call."""

    def __init__(self, guard: Guard, run: Running, result: ResultTree) -> None:
        self.guard, self.run, self.result = guard, run, result
        self.compilation: Compilation | None = None

    def __call__(self, inputs: Leaves) -> Tree:
        """The answer."""
        return self.result.put(self.run(inputs))

    def at_point(self, inputs: Leaves, kept: Kept, is_replayed: bool) -> Any:
        """The answer, from what is kept of a point."""
        return self.result.put(kept(inputs, is_replayed))


def first_that_holds(
    entries: Iterable[CompiledCall], arguments: CallArguments, kind: Any, tensors: Sequence[Tensor]
) -> CompiledCall | None:
    """The first entry that holds for these arguments and surroundings; None if none does."""
    for entry in entries:
        if entry.guard.admits(arguments, kind, tensors):
            return entry
    return None


@dataclass
class Making:
    """How the entry for a call is made.

    Args:
        func: what is compiled.
        surroundings: what it refers to.
        args, kwargs: of the call.
        num_fixed: so many arguments are fixed at a point, the first ones; None if there is none.
    """

    func: Callable[..., Any]
    surroundings: Surroundings
    arguments: CallArguments
    args: tuple[Tree, ...]
    kwargs: dict[str, Any]
    compiler: Compiler
    num_fixed: int | None = None
    answer: Tree = None
    """The function's own; with its tensors, and how long it and the traces took."""
    outputs: Leaves = ()
    seconds: tuple[float, float] = (0.0, 0.0)

    def entry(self) -> CompiledCall:
        """The entry, traced; nothing is compiled yet.

        Raises:
            Nameless, NotImplementedError: if no trace would hold.
        """
        arguments, tensors = self.arguments, self.surroundings.tensors
        guard = Guard(arguments, self.surroundings.kind, tensors)
        call = partial(self.func, *self.args, **self.kwargs)
        self.answer = call()
        self.outputs, result = ResultTree.of(self.answer)
        eager = _fastest(call, self.outputs)
        start = time.perf_counter()
        has_graph = any(out.requires_grad for out in self.outputs)
        run: Running
        if self.num_fixed is not None:
            run = self._divided(self.num_fixed)
        else:
            run = self._differentiable() if has_graph else self._cheapest()
        self._check_pure()
        self.seconds = eager, time.perf_counter() - start
        return CompiledCall(guard, run, result)

    def check(self, entry: CompiledCall) -> None:
        """Compile the entry, and compare its numbers with those of the function.

        Raises:
            Refused: if they differ by more than rounding.
        """
        inputs, run = (*self.arguments.leaves, *self.surroundings.tensors), entry.run
        nodes = run.graph.graph.nodes
        values = [node.meta.get("val") for node in nodes]
        dtypes = [value.dtype for value in values if isinstance(value, Tensor)]
        with torch.no_grad():
            if not agree(self.outputs, run(inputs), dtypes):
                raise Refused(
                    "what is compiled computes other numbers. Pass backend='replay', and report it"
                )
            seconds = _fastest(partial(run, inputs), self.outputs)
        eager, tracing = self.seconds
        count = sum(node.op == "call_function" for node in nodes)
        entry.compilation = Compilation(
            *(tracing, run.compile_seconds, eager, seconds, count),
            *(run.constant_bytes, run.peak_bytes(inputs), self.compiler.backend),
        )

    @property
    def _inputs(self) -> Leaves:
        """Inputs to trace at: aliases of arguments, as two may be one tensor, or be referred to."""
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in self.arguments.leaves]
        return (*leaves, *self.surroundings.tensors)

    def _outputs_at(self, inputs: Leaves) -> Leaves:
        """The tensors of the function's result at other arguments."""
        put = self.arguments.put_into(self.args, self.kwargs)
        args, kwargs = put(inputs[: len(self.arguments.leaves)])
        everything, _ = flatten_containers(self.func(*args, **kwargs))
        return tuple([x for x in everything if isinstance(x, Tensor)])

    def _cheapest(self) -> Executable:
        """What takes the fewest operations of all ways that give the same answer."""
        directions: Any = getattr(self.func, "directions", None)
        if directions is None:
            return self._plain()
        ways = []
        for func in directions():
            try:
                ways.append(replace(self, func=func)._plain())
            except (NotImplementedError, RuntimeError, ValueError) as error:
                note("%s is not compiled: %s", func.__qualname__, error)
        inputs = self._inputs
        return min(ways, key=lambda way: way.flops(inputs)) if ways else self._plain()

    def _divided(self, num_fixed: int) -> Divided:
        fixed = CallArguments.of(self.args[:num_fixed], {}).leaves
        how = self._inputs, range(len(fixed), len(self.arguments.leaves)), self.compiler
        sure = Divided(self._cheapest(), *how)
        try:
            with from_factors() as taken:
                self.func(*self.args, **self.kwargs)  # later calls do not learn what it does
                if not any(taken):
                    return sure
                other = Divided(self._plain(), *how, sure)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            note("products at a point do not come from factors: %s", error)
            return sure
        return other if other.cost < sure.cost else sure

    def _plain(self) -> Executable:
        def forward(*inputs: Tensor) -> Leaves:
            return tuple([out.detach() for out in self._outputs_at(inputs)])

        return self._executable(forward, self._inputs)

    def _differentiable(self) -> Differentiable:
        """What returns outputs with a graph: the pullback is traced now, as of this function.

        Raises:
            Nameless: if a hook on a tensor would act in the trace, and once more behind it.
        """
        if any(Graphs.hooks_of(x) for x in self.surroundings.tensors):
            raise Nameless(
                "func must refer to tensors without hooks where its result has a graph, got one "
                "with a hook on its gradient. Call the derivative as it is, or under no_grad()."
            )
        inputs = self._inputs
        receivers = [number for number, x in enumerate(inputs) if x.requires_grad]
        reached = set(receivers)

        def backward(*given: Tensor) -> Leaves:
            at = given[: len(inputs)]
            with recording():
                values = [out for out in self._outputs_at(at) if out.is_floating_point()]
            pairs = zip(values, given[len(inputs) :], strict=True)
            outputs, cotangents = zip(*[p for p in pairs if p[0].requires_grad], strict=True)
            ends = tuple([at[number] for number in receivers])
            pulled = run_backward(outputs, ends, cotangents, False)
            reached.intersection_update(
                n for n, x in zip(receivers, pulled, strict=True) if x is not None
            )
            return tuple([x.detach() for x in pulled if x is not None])

        seeds = tuple([torch.ones_like(x) for x in self.outputs if x.is_floating_point()])
        return Differentiable(
            self._plain(),
            self._executable(backward, (*inputs, *seeds)),
            [number in reached for number in range(len(inputs))],
        )

    def _executable(self, func: Callable[..., Leaves], inputs: Leaves) -> Executable:
        num_args = len(self.arguments.leaves)
        return Executable(traced(func, inputs), inputs, num_args, self.compiler)

    def _check_pure(self) -> None:
        """Refuse a function that has changed what it refers to.

        Raises:
            Nameless: if it has.
        """
        if self.surroundings.are_current():
            return
        if Surroundings(self.func).kind != self.surroundings.kind:
            raise Nameless(
                "func must change nothing that it refers to, got one that does: what is compiled "
                "would not. Return what it should keep."
            )


def _fastest(run: Callable[[], Any], outputs: Leaves) -> float:
    """Seconds of the fastest of a few runs: the first finds its memory and its code cold."""
    device = outputs[0].device if outputs else torch.get_default_device()
    times: list[float] = []
    while len(times) < MOST_TIMED and sum(times) < ENOUGH:
        times.append(seconds_of(run, device))
    return min(times)
