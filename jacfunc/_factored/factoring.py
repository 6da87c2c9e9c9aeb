"""Samples evaluated, and their parameters found where they are used."""

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
from jacfunc._faults import untracked, watched_once
from jacfunc._linear_map import (
    Anchor,
    Graph,
    OfOne,
    Samples,
    anchored,
    copied,
    leading_out,
    linearize,
    on_graph,
)
from jacfunc._remembered import CallKind, Remembered
from jacfunc._torch import Pull, inside_derivative, inside_transform, math_attention, recording
from jacfunc._types import LeafFunction, Leaves


@dataclass
class LearnedUses:
    """What parameters of one kind of call meet, by their numbers.

    Args:
        others: those that are used where no rule sees it.
        written: those that the function writes into.
        ruled: those that operations with rules alone are given, which only read them; None before
            the first evaluation.
    """

    others: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    ruled: set[int] | None = None

    @classmethod
    def of(cls, kind: CallKind) -> LearnedUses:
        """What is known of the parameters, to be completed by whoever evaluates the call."""
        return learned_uses().get_or_make(kind.version, kind.kind, cls)

    @property
    def lent(self) -> set[int]:
        """Those that need no copy."""
        return (self.ruled or set()) - self.others

    def copy(self, anchor: Tensor, number: int, samples: Samples) -> Tensor:
        """What the function gets: its own, where it may write into it."""
        if number in self.lent:
            return anchor.view_as(anchor)
        own = samples.each(anchor) if number in self.others else anchor
        return own if number in self.others - self.written else copied(own)

    def learn(self, count: int, others: set[int], touched: UnruledUse) -> bool:
        """From an evaluation of so many parameters; should it have got others?"""
        shared = self.others - self.written
        was_wrong = self.lent & touched.given or shared & touched.written or others - self.others
        self.others |= others
        self.written |= touched.written
        self.ruled = (set(range(count)) if self.ruled is None else self.ruled) - touched.given
        return bool(was_wrong)


@cache
def learned_uses() -> Remembered[LearnedUses]:
    """By functions, and modules as they are: one that was changed may write into parameters."""
    return Remembered()


def factored(
    of_one: OfOne,
    call: LeafFunction,
    params: Leaves,
    samples: Samples,
    met: LearnedUses,
    repeat_draws: Callable[[], None],
) -> FactoredJacobian:
    """Evaluate and find the uses; what the parameters ``met`` is remembered.

    ``call`` is one of a sample, which may say of what kind it is.

    Raises:
        Refused: inside a transform that differentiates, where no graph is kept.
    """
    if inside_derivative() or torch.compiler.is_compiling():
        raise Refused("factors of layers are found on a plain graph, which no transform keeps")
    if inside_transform():
        repeat_draws()
        # vmap shows no graph: parameters are differentiated as they are
        unfactored = linearize(*samples.apart(of_one, params))
        return FactoredJacobian(samples, (), range(len(params)), params, unfactored)
    while True:
        repeat_draws()
        touched = UnruledUse()
        try:
            found, others = _evaluated(of_one, call, params, samples, met, touched)
        except Exception:
            # it was not told that it may not write, and what it makes of that is not its fault
            if not met.learn(len(params), set(), touched):
                raise
            continue
        if not met.learn(len(params), others, touched):
            return found


def _evaluated(
    of_one: OfOne,
    call: LeafFunction,
    params: Leaves,
    samples: Samples,
    met: LearnedUses,
    touched: UnruledUse,
) -> tuple[FactoredJacobian, set[int]]:
    """The factors, and which parameters are used where no rule sees it."""
    wanted, others = torch.is_grad_enabled(), sorted(met.others)
    with recording(), math_attention():
        check_plain(params)
        anchors = [anchored(param, wanted) for param in params]
        twins = [anchor.view_as(anchor) for anchor in anchors]
        held = [met.copy(anchor, i, samples) for i, anchor in enumerate(anchors)]
        behind = [Anchor.behind(held[i]) for i in others]  # of_one may write into them
        starts = [handle.grad_fn for handle in held]
        found: list[Use] = []
        uses_of = partial(UseRecorder, samples.size, met.lent, touched)
        of_all = _recording(of_one, samples, others, twins, uses_of, found)
        further = wanted and any(param.requires_grad for param in params)
        pull = Pull(None, (wanted, further), leading_out(set(starts), wanted, further))
        outputs, extras = watched_once(of_all, held, params, pull, call)
    cut = set(starts).union(*(use.ends for use in found))
    state = getattr(call, "state", None)
    as_evaluated = None if state is None else state.as_evaluated()
    graph = Graph.of((*outputs, *extras), cut, set().union(*(use.nodes for use in found)))
    if not all(use.is_all(graph) for use in found):
        raise Refused("a parameter is used in a derivative that the function takes itself")
    if graph.leads_out and state is not None:
        state.check_fresh(outputs)
    differentiated = further or (wanted and graph.leads_out)
    targets = [*(use.anchor for use in found), *behind]
    linearization = on_graph(outputs, extras, targets, graph, differentiated, as_evaluated)
    used = {i for i, node in enumerate(starts) if node in graph.met}
    return FactoredJacobian(samples, found, others, params, linearization), used


def _recording(
    of_one: OfOne,
    samples: Samples,
    others: Sequence[int],
    twins: Sequence[Tensor],
    uses_of: Callable[[], UseRecorder],
    found: list[Use],
) -> Callable[..., tuple[Leaves, Leaves]]:
    """Of all samples at once: a function of the parameters that writes down their uses."""
    dims = [0 if i in others else None for i in range(len(twins))]

    def recorded(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
        with untracked():
            uses = uses_of()
            for number, (param, twin) in enumerate(zip(params, twins, strict=True)):
                uses.track(number, param, twin)
        with uses:
            outputs, extras = of_one(params, data)
        found[:] = uses.found()
        return outputs, extras

    def of_all(*held: Tensor) -> tuple[Leaves, Leaves]:
        return samples.map(recorded, held, dims)

    return of_all
