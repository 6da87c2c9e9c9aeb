"""One more evaluation of a batch as a whole, of which earlier ones have shown all but the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian
from jacfunc._factored.learned import LearnedUses
from jacfunc._factored.tracked import TrackedParameters, UnruledUse
from jacfunc._factored.tracking import UseRecorder
from jacfunc._layouts import PlainSamples, VmappedSamples
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    differentiable_alias,
    map_of_graph,
    writable_copy,
)
from jacfunc._torch import Pull
from jacfunc._types import Leaves


class RepeatedEvaluation:
    """What a function of parameters and of a tensor with the samples in front gets, and its graph.

    It is made while autograd records. The function is called with ``handles`` and ``x`` under the
    ``recorder``; of what it returns :meth:`jacobian` is the Jacobian.

    Args:
        params: what all samples share, and it is differentiated by.
        x: the tensor of all samples.
        learned: what earlier evaluations have shown.
        by_layers: are operations looked for that use parameters? Else these are differentiated as
            they are, which one sample alone allows.
        by_inputs: is it differentiated by ``x``, too?
    """

    def __init__(
        self, params: Leaves, x: Tensor, learned: LearnedUses, by_layers: bool, by_inputs: bool
    ) -> None:
        count, self._learned, self._by_layers = len(params), learned, by_layers
        self._size, self._is_shared = len(x), count > 0
        lent = learned.lent if by_layers else set[int]()
        anchors = [differentiable_alias(param, False) for param in params]
        self.handles = [
            anchor.view_as(anchor) if number in lent else writable_copy(anchor)
            for number, anchor in enumerate(anchors)
        ]
        self.x = writable_copy(differentiable_alias(x, False)) if by_inputs else x.clone()
        self._direct = [] if by_layers else [Direct(number, None) for number in range(count)]
        self._direct += [Direct(count)] if by_inputs else []
        self._params = (*params, x[0]) if by_inputs else params
        every = (*self.handles, self.x)
        self._starts: dict[Any, int] = {
            handle.grad_fn: number for number, handle in enumerate(every[: len(self._params)])
        }
        # the function may write into these
        self._anchors = [Anchor.behind(every[direct.number]) for direct in self._direct]
        self._unruled = UnruledUse()
        tracked = TrackedParameters(lent, self._unruled)
        for number, twin in enumerate(anchors if by_layers else ()):
            tracked.track(number, self.handles[number], twin)
        is_one = self._size == 1
        sites = learned.sites or {}
        placing = VmappedSamples(1, None) if is_one else PlainSamples(self._size, sites)
        self.recorder = UseRecorder(placing, tracked, self._starts, False, learned.uses)

    def pull(self, around: tuple[Any, ...]) -> Pull:
        """The pullback that follows, as a watch of the evaluation must know it."""
        return Pull(None, around, LeadsOut(self._starts, grad_mode=False, has_left=False))

    def jacobian(self, out: Tensor, as_evaluated: Callable[[], None]) -> FactoredJacobian | None:
        """The Jacobian of what the function returned; None if parameters are used otherwise.

        Args:
            as_evaluated: is called before each pullback.

        Raises:
            Exception: if an operation is not what was known of it.
        """
        recorder, graph = self.recorder, self._graph(out)
        if graph is None:
            return None
        anchors = [*(use.anchor for use in recorder.uses), *self._anchors]
        linearization = map_of_graph((out,), (), anchors, graph, False, as_evaluated)
        if not linearization.is_batchable:
            return None
        return FactoredJacobian(
            self._size,
            recorder.uses,
            self._direct,
            self._params,
            linearization,
            recorder.derived.by_number,
            signature=recorder.signature,
            moves_samples=recorder.moves_samples,
            reads_values=recorder.reads_values,
        )

    def _graph(self, out: Tensor) -> Graph | None:
        """The graph behind the output; None if parameters are used otherwise than before."""
        if not self._by_layers:
            graph = Graph.back_to(set(self._starts), (out,))
            return None if graph.leads_out and self._is_shared else graph
        recorder, starts, unruled = self.recorder, self._starts, self._unruled
        recorder.finish()
        uses = recorder.uses
        cut = set(starts).union(*(use.ends for use in uses))
        graph = Graph.of((out,), cut, set().union(*(use.nodes for use in uses)))
        if graph.leads_out or not all(use.is_complete(graph) for use in uses):
            return None
        met = recorder.derived.parameters(n for node, n in starts.items() if node in graph.met)
        others = met - {direct.number for direct in self._direct}
        count = len(self._params)
        is_void = self._learned.learn(count, others, unruled.numbers, unruled.written)
        return None if others or is_void else graph
