"""Evaluates all samples, and finds the operations that use each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._arguments import check_plain
from jacfunc._errors import Refused, UnseenWrite
from jacfunc._factored.batches import Batch, Image, VmappedBatch
from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian
from jacfunc._factored.learned import LearnedUses, Outdated
from jacfunc._factored.tracked import TrackedParameters, UnruledUse
from jacfunc._factored.tracking import UseRecorder
from jacfunc._faults import watched_once
from jacfunc._layouts import NoLayout, Placing, Unlike
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    differentiable_alias,
    linearize,
    map_of_graph,
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


class _Handles(NamedTuple):
    """What the function gets for its primals, in one evaluation.

    Args:
        every: one for each primal.
        twins: what operations with rules get in the place of those that are tracked.
        starts: the nodes at which the graph of the evaluation begins, with numbers of primals.
        direct: anchors of the primals that are differentiated as they are.
        grad_mode: is a graph kept of the outputs?
        further: may the outputs be differentiated further, by primals that have a graph?
    """

    every: list[Tensor]
    twins: dict[int, Tensor]
    starts: dict[Any, int]
    direct: list[Anchor]
    grad_mode: bool
    further: bool

    @classmethod
    def of(cls, batch: Batch, learned: LearnedUses) -> _Handles:
        check_plain(batch.primals)
        grad_mode = torch.is_grad_enabled()
        further = grad_mode and any(primal.requires_grad for primal in batch.primals)
        with recording():
            anchors = [differentiable_alias(primal, grad_mode) for primal in batch.primals]
            twins = {number: anchors[number] for number in batch.tracked(learned)}
            every = [batch.handle(i, anchor, learned) for i, anchor in enumerate(anchors)]
            # the function may write into these
            direct = [Anchor.behind(every[x.number]) for x in batch.direct(learned)]
        starts = {handle.grad_fn: number for number, handle in enumerate(every)}
        return cls(every, twins, starts, direct, grad_mode, further)


def _recorded(
    batch: Batch, learned: LearnedUses, handles: _Handles, unruled: UnruledUse
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
    handles, direct = _Handles.of(batch, learned), batch.direct(learned)
    (outputs, extras), recorder = _recorded(batch, learned, handles, unruled)
    uses, starts, derived = recorder.uses, handles.starts, recorder.derived
    cut = set(starts).union(*(use.ends for use in uses))
    state = getattr(batch.call, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph = Graph.of((*outputs, *extras), cut, set().union(*(use.nodes for use in uses)))
    if not all(use.is_complete(graph) for use in uses):
        raise Refused("a parameter is used in a derivative that the function takes itself")
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = handles.further or (handles.grad_mode and graph.leads_out)
    targets = [*(use.anchor for use in uses), *handles.direct]
    linearization = map_of_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
    met = derived.parameters(number for node, number in starts.items() if node in graph.met)
    jacobian = FactoredJacobian(
        batch.size,
        uses,
        direct,
        batch.params,
        linearization,
        derived.by_number,
        signature=recorder.signature,
        moves_samples=recorder.moves_samples,
        reads_values=recorder.reads_values,
    )
    return jacobian, met - {primal.number for primal in direct}
