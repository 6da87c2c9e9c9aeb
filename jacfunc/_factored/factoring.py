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
from jacfunc._factored.tracked import TrackedParameter, TrackedParameters, UnruledUse
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
    Graph,
    LeadsOut,
    graph_number,
    linearize,
    map_of_graph,
    nodes_of_calls,
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
            params = TrackedParameters(learned.lent, unruled, learned.hooked)
            for number, twin in handles.twins.items():
                params.track(number, primals[number], twin)
            grad_mode, known = handles.grad_mode, learned.uses
            recorder = UseRecorder(placing, params, handles.starts, grad_mode, known)
            if placing.can_share and not learned.mixes:
                recorder.samples = placing.size
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
    graph, met = graph_behind((*outputs, *extras), recorder, handles.starts)
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = handles.further or (handles.grad_mode and graph.leads_out)
    targets = [*(use.anchor for use in recorder.uses), *handles.direct]
    linearization = map_of_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
    jacobian = FactoredJacobian(
        batch.size,
        recorder.uses,
        direct,
        batch.params,
        linearization,
        recorder.derived.by_number,
        signature=recorder.signature,
        moves_samples=recorder.moves_samples,
        moves_unseen=recorder.moves_unseen,
        reads_values=recorder.reads_values,
        apart=recorder.apart,
    )
    return jacobian, met - {primal.number for primal in direct}


def graph_behind(
    leaves: Leaves, recorder: UseRecorder, starts: Mapping[Any, int]
) -> tuple[Graph, set[int]]:
    """The graph behind what a function returned, and the parameters that a path leads to.

    Raises:
        Refused: if a path passes an operation with a rule by.
    """
    uses, cut = recorder.uses, set(starts)
    for use in uses:
        cut |= use.ends
    nodes_of_uses = nodes_of_calls([(use.last, use.ends) for use in uses])
    graph = Graph.of(leaves, cut, set().union(*nodes_of_uses))
    recorder.graph = graph_number(leaves, cut)
    for use, nodes in zip(uses, nodes_of_uses, strict=True):
        # a derivative uses parameters again, in operations that no rule sees
        if not set().union(*filter(None, map(graph.met.get, nodes))) <= nodes | {use.last}:
            raise Refused("a parameter is used in a derivative that the function takes itself")
    met = [number for node, number in starts.items() if node in graph.met]
    return graph, recorder.derived.parameters(met)


def use_recorder(
    anchors: Sequence[Tensor],
    handles: Sequence[Tensor],
    starts: dict[Any, int],
    learned: LearnedUses,
    size: int,
) -> UseRecorder:
    """A recorder of the uses of parameters by so many samples, of a kind that was learned.

    Args:
        anchors: tensors at the parameters, with which the graph begins.
        handles: what the function gets, in their places.
        starts: the nodes of the handles, and of what else it is differentiated by.
    """
    params = TrackedParameters(learned.lent, UnruledUse(), learned.hooked)
    for number, (handle, twin) in enumerate(zip(handles, anchors, strict=True)):
        tracked = TrackedParameter(number, handle, twin, (), handle, handle._version)
        params.by_id[id(handle)] = tracked
    is_one, sites = size == 1, learned.sites or {}
    placing = VmappedSamples(1, None) if is_one else PlainSamples(size, sites)
    return UseRecorder(placing, params, starts, False, learned.uses)
