"""Evaluates all samples, and finds the operations that use each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from jacfunc._arguments import check_plain
from jacfunc._errors import Refused
from jacfunc._factored.factored_jacobian import FactoredJacobian
from jacfunc._factored.tracked import UnruledUse
from jacfunc._factored.tracking import UseRecorder
from jacfunc._factored.use import Use
from jacfunc._faults import watched_once
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    SampleFunction,
    Samples,
    differentiable_alias,
    linearize,
    map_of_graph,
    writable_copy,
)
from jacfunc._remembered import CallKind, Remembered
from jacfunc._torch import (
    MathAttention,
    Pull,
    inside_derivative,
    inside_transform,
    recording,
    untracked,
)
from jacfunc._types import LeafFunction, Leaves


@dataclass
class LearnedUses:
    """How the function uses its parameters, by number, as earlier calls of one kind have shown.

    Args:
        others: parameters that are used where no rule sees it.
        written: parameters that the function writes into.
        ruled: parameters that only operations with rules get, which read them alone; None before
            the first evaluation.
    """

    others: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    ruled: set[int] | None = None

    @classmethod
    def of(cls, kind: CallKind) -> LearnedUses:
        """What earlier calls of this kind have shown; evaluations add to it."""
        return learned_uses().get_or_make(kind.version, kind.kind, cls)

    @property
    def lent(self) -> set[int]:
        """Parameters that the function gets without a copy."""
        return (self.ruled or set()) - self.others

    def handle(self, anchor: Tensor, number: int, samples: Samples) -> Tensor:
        """What the function gets as parameter ``number``: a copy if it may write into it."""
        if number in self.lent:
            return anchor.view_as(anchor)
        own = samples.each(anchor) if number in self.others else anchor
        return own if number in self.others - self.written else writable_copy(own)

    def learn(self, count: int, others: set[int], unruled: UnruledUse) -> bool:
        """Take in what one evaluation of ``count`` parameters showed.

        Returns:
            Whether the evaluation is void, as the function should have got other handles.
        """
        shared = self.others - self.written
        is_void = self.lent & unruled.numbers or shared & unruled.written or others - self.others
        self.others |= others
        self.written |= unruled.written
        self.ruled = (set(range(count)) if self.ruled is None else self.ruled) - unruled.numbers
        return bool(is_void)


@cache
def learned_uses() -> Remembered[LearnedUses]:
    """The learned uses of this process, by function, or by module and its version."""
    return Remembered()


def factored(
    of_one: SampleFunction,
    call: LeafFunction,
    params: Leaves,
    samples: Samples,
    learned: LearnedUses,
    repeat_draws: Callable[[], None],
) -> FactoredJacobian:
    """Evaluate all samples, with the Jacobian of each parameter as factors.

    The evaluation is repeated until ``learned`` holds all that it needed to know.

    Args:
        of_one: the function of the parameters and the data of one sample.
        call: the call of one sample, whose kind tells what earlier calls have shown.

    Raises:
        Refused: inside a transform that differentiates, where no graph is kept.
    """
    if inside_derivative() or torch.compiler.is_compiling():
        raise Refused("factors of layers are found on a plain graph, which no transform keeps")
    if inside_transform():
        repeat_draws()
        # vmap shows no graph: every parameter is differentiated as it is
        unfactored = linearize(*samples.with_own_params(of_one, params))
        return FactoredJacobian(samples, (), range(len(params)), params, unfactored)
    while True:
        repeat_draws()
        unruled = UnruledUse()
        try:
            jacobian, others = _evaluated(of_one, call, params, samples, learned, unruled)
        except Exception:
            # the function may have failed because a handle is no copy: then go on with copies
            if not learned.learn(len(params), set(), unruled):
                raise
            continue
        if not learned.learn(len(params), others, unruled):
            return jacobian


def _evaluated(
    of_one: SampleFunction,
    call: LeafFunction,
    params: Leaves,
    samples: Samples,
    learned: LearnedUses,
    unruled: UnruledUse,
) -> tuple[FactoredJacobian, set[int]]:
    """The factors of one evaluation, and the parameters that are used where no rule sees it."""
    grad_mode, others = torch.is_grad_enabled(), sorted(learned.others)
    with recording(), MathAttention():
        check_plain(params)
        anchors = [differentiable_alias(param, grad_mode) for param in params]
        twins = [anchor.view_as(anchor) for anchor in anchors]
        handles = [learned.handle(anchor, i, samples) for i, anchor in enumerate(anchors)]
        behind = [Anchor.behind(handles[i]) for i in others]  # of_one may write into them
        starts = [handle.grad_fn for handle in handles]
        uses: list[Use] = []
        recorder = partial(UseRecorder, samples.size, learned.lent, unruled)
        of_all = _recording(of_one, samples, others, twins, recorder, uses)
        further = grad_mode and any(param.requires_grad for param in params)
        pull = Pull(None, (grad_mode, further), LeadsOut(set(starts), grad_mode, further))
        outputs, extras = watched_once(of_all, handles, params, pull, call)
    cut = set(starts).union(*(use.ends for use in uses))
    state = getattr(call, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph = Graph.of((*outputs, *extras), cut, set().union(*(use.nodes for use in uses)))
    if not all(use.is_complete(graph) for use in uses):
        raise Refused("a parameter is used in a derivative that the function takes itself")
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = further or (grad_mode and graph.leads_out)
    targets = [*(use.anchor for use in uses), *behind]
    linearization = map_of_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
    unruled_numbers = {i for i, node in enumerate(starts) if node in graph.met}
    return FactoredJacobian(samples, uses, others, params, linearization), unruled_numbers


def _recording(
    of_one: SampleFunction,
    samples: Samples,
    others: Sequence[int],
    twins: Sequence[Tensor],
    recorder: Callable[[], UseRecorder],
    uses: list[Use],
) -> Callable[..., tuple[Leaves, Leaves]]:
    """The function of all samples, which takes handles of the parameters and fills ``uses``."""
    dims = [0 if i in others else None for i in range(len(twins))]

    def recorded(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
        with untracked():
            recording = recorder()
            for number, (param, twin) in enumerate(zip(params, twins, strict=True)):
                recording.track(number, param, twin)
        with recording:
            outputs, extras = of_one(params, data)
        uses[:] = recording.uses()
        return outputs, extras

    def of_all(*handles: Tensor) -> tuple[Leaves, Leaves]:
        return samples.map(recorded, handles, dims)

    return of_all
