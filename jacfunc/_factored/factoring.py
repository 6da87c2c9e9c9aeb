"""Evaluates all samples, and finds the operations that use each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused, UnseenWrite
from jacfunc._factored.batches import Batch, Handles, Image, VmappedBatch
from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian
from jacfunc._factored.learned import LearnedUses, Outdated
from jacfunc._factored.tracked import TrackedParameters, UnruledUse
from jacfunc._factored.tracking import UseRecorder
from jacfunc._faults import watched_once
from jacfunc._layouts import (
    NoLayout,
    Placing,
    PlainSamples,
    Unlike,
    VmappedSamples,
)
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    Linearization,
    differentiable_alias,
    linearize,
    map_of_graph,
    writable_copy,
)
from jacfunc._torch import (
    MathAttention,
    Pull,
    inside_derivative,
    inside_transform,
    recording,
    untracked,
)
from jacfunc._types import Leaves


def factored(
    batch: Batch, learned: LearnedUses, repeat_draws: Callable[[], None]
) -> FactoredJacobian:
    """Evaluate all samples, with the Jacobian of each parameter as factors.

    The evaluation is repeated until ``learned`` holds all that it needed to know.

    Raises:
        Refused: inside a transform that differentiates, where no graph is kept.
    """
    if inside_derivative() or torch.compiler.is_compiling():
        raise Refused("factors of layers are found on a plain graph, which no transform keeps")
    if inside_transform():
        assert isinstance(batch, VmappedBatch)
        repeat_draws()
        # vmap shows no graph: every parameter is differentiated as it is
        params = batch.primals
        unfactored = linearize(*batch.samples.with_own_params(batch.of_one, params))
        dim = 0 if batch.samples.is_mapped else None
        every = [Direct(number, dim) for number in range(len(params))]
        return FactoredJacobian(batch.size, (), every, params, unfactored)
    while True:
        repeat_draws()
        unruled, count = UnruledUse(), len(batch.primals)
        try:
            jacobian, others = _evaluated(batch, learned, unruled)
        except Outdated:
            learned.uses.clear()
            continue
        except (Unlike, NoLayout):
            raise
        except UnseenWrite:
            learned.ruled = None  # later evaluations get copies again
            raise
        except Exception:
            # the function may have failed because a handle is no copy: then go on with copies
            if not learned.learn(count, set(), unruled.numbers, unruled.written):
                raise
            continue
        if not learned.learn(count, others, unruled.numbers, unruled.written):
            return jacobian


def _recorded(
    batch: Batch, learned: LearnedUses, handles: Handles, unruled: UnruledUse
) -> tuple[Image, UseRecorder]:
    """Outputs and extras of one evaluation, and the operations that used parameters in it."""
    recorders: list[UseRecorder] = []

    def record(placing: Placing, primals: Leaves, evaluate: Callable[[], Image]) -> Image:
        with untracked():
            params = TrackedParameters(learned.lent, unruled)
            for number, twin in handles.twins.items():
                params.track(number, primals[number], twin)
            grad_mode, known = handles.grad_mode, learned.uses
            recorder = UseRecorder(placing, params, handles.starts, grad_mode, known)
        recorders[:] = [recorder]
        with recorder:
            image = evaluate()
        recorder.finish()
        return image

    def of_all(*primals: Tensor) -> Image:
        return batch.evaluate(record, primals, learned)

    def unrecorded(*primals: Tensor) -> Image:
        every = tuple([batch.handle(i, x, learned) for i, x in enumerate(primals)])
        return batch.evaluate(lambda _, __, evaluate: evaluate(), every, learned)

    # a batch as a whole is known by what is recorded of it
    again = unrecorded if isinstance(batch, VmappedBatch) else None
    grad_mode, further = handles.grad_mode, handles.further
    pull = Pull(None, (grad_mode, further), LeadsOut(handles.starts, grad_mode, further))
    with recording(), MathAttention():
        image = watched_once(of_all, handles.every, batch.primals, pull, batch.call, again)
    return image, recorders[0]


def _evaluated(
    batch: Batch, learned: LearnedUses, unruled: UnruledUse
) -> tuple[FactoredJacobian, set[int]]:
    """The factors of one evaluation, and new parameters that are used where no rule sees it."""
    handles, direct = Handles.of(batch, learned), batch.direct(learned)
    (outputs, extras), recorder = _recorded(batch, learned, handles, unruled)
    state = getattr(batch.call, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph, met = _graph_behind((*outputs, *extras), recorder, handles.starts)
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = handles.further or (handles.grad_mode and graph.leads_out)
    targets = [*(use.anchor for use in recorder.uses), *handles.direct]
    linearization = map_of_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
    jacobian = _jacobian(batch.size, recorder, direct, batch.params, linearization)
    return jacobian, met - {primal.number for primal in direct}


def _graph_behind(
    leaves: Leaves, recorder: UseRecorder, starts: Mapping[Any, int]
) -> tuple[Graph, set[int]]:
    """The graph behind what a function returned, and the parameters that a path leads to.

    Raises:
        Refused: if a path passes an operation with a rule by.
    """
    nodes, cut = set[Any](), set(starts)
    for use in recorder.uses:
        nodes |= use.nodes
        cut |= use.ends
    graph = Graph.of(leaves, cut, nodes)
    if not all(use.is_complete(graph) for use in recorder.uses):
        raise Refused("a parameter is used in a derivative that the function takes itself")
    met = [number for node, number in starts.items() if node in graph.met]
    return graph, recorder.derived.parameters(met)


def _jacobian(
    size: int,
    recorder: UseRecorder,
    direct: Sequence[Direct],
    params: Leaves,
    linearization: Linearization,
) -> FactoredJacobian:
    """The Jacobian of an evaluation with these records."""
    return FactoredJacobian(
        size,
        recorder.uses,
        direct,
        params,
        linearization,
        recorder.derived.by_number,
        signature=recorder.signature,
        moves_samples=recorder.moves_samples,
        reads_values=recorder.reads_values,
    )


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
        count, self._size = len(params), len(x)
        self._learned, self._by_layers = learned, by_layers
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
        self.primals: Leaves = every[: len(self._params)]
        self._starts = {handle.grad_fn: number for number, handle in enumerate(self.primals)}
        # the function may write into these
        self._anchors = [Anchor.behind(every[direct.number]) for direct in self._direct]
        tracked, sites = TrackedParameters(lent, UnruledUse()), learned.sites or {}
        for number, twin in enumerate(anchors if by_layers else ()):
            tracked.track(number, self.handles[number], twin)
        placing = VmappedSamples(1, None) if len(x) == 1 else PlainSamples(len(x), sites)
        self.recorder = UseRecorder(placing, tracked, self._starts, False, learned.uses)

    def pull(self, around: tuple[Any, ...]) -> Pull:
        """The pullback that follows, as a watch of the evaluation must know it."""
        return Pull(None, around, LeadsOut(self._starts, grad_mode=False, has_left=False))

    def jacobian(
        self, out: Tensor, as_evaluated: Callable[[], None] | None
    ) -> FactoredJacobian | None:
        """The Jacobian of what the function returned; None if parameters are used otherwise.

        An operation may raise an error, if it is not what was known of it. What was evaluated is
        put back ``as_evaluated`` before each pullback.
        """
        recorder = self.recorder
        if self._by_layers:
            unruled, count = recorder.finish(), len(self._params)
            graph, met = _graph_behind((out,), recorder, self._starts)
            others = met - {direct.number for direct in self._direct}
            if self._learned.learn(count, others, unruled.numbers, unruled.written) or others:
                return None
        else:
            graph = Graph.back_to(set(self._starts), (out,))
        if graph.leads_out and self.handles:
            return None
        targets = [*(use.anchor for use in recorder.uses), *self._anchors]
        linearization = map_of_graph((out,), (), targets, graph, False, as_evaluated)
        if not linearization.is_batchable:
            return None
        return _jacobian(self._size, recorder, self._direct, self._params, linearization)
