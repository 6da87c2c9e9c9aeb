"""Sweeps of settled calls, written down once: what pulls back, and makes the result of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from jacfunc._errors import Nameless
from jacfunc._factored import HOOKING, FactoredJacobian, LearnedUses, UseRecorder
from jacfunc._lending import ModuleState
from jacfunc._rounding import agree
from jacfunc._settled.alone import SettledModule, are_alone
from jacfunc._settled.following import Following, Reads, Steps
from jacfunc._settled.repeated import RepeatedEvaluation
from jacfunc._torch import MathAttention, may_attend, recording
from jacfunc._traces import (
    Sources,
    WrittenWork,
    fingerprint,
    outline,
)
from jacfunc._trees import Given
from jacfunc._types import Leaves

NOTHING = nullcontext()
"""A context that does nothing."""

MOST_WORKS = 4
"""Works that are known of a kind of call."""

Work: TypeAlias = Callable[[FactoredJacobian, Leaves], Leaves]
"""Makes the result of an evaluated batch, and of tensors beside it. Equal ones do the same.

A result that is more than its tensors is a tuple with ``like``, which makes one of others."""

Beside: TypeAlias = Callable[[Leaves], Leaves]
"""The tensors that a work takes beside a batch, as targets are; it gets the outputs for them."""

Evaluated: TypeAlias = tuple[RepeatedEvaluation, Sources, Tensor]
"""An evaluation of which sources are kept, and what the module returned."""


class Sweep:
    """A work at evaluations of one kind, written down: it reads what autograd has saved.

    No graph is swept any more. It holds where an evaluation calls the same operations, with
    tensors of the same shapes, has the same graph, and saves tensors of the same kinds, equal ones
    at the same places.

    Args:
        evaluated: one of these evaluations, in which uses of parameters were looked for.
        beside: the tensors that the work takes beside.
        work: makes the result.
        graph: the number of the graph that is known of evaluations like it. Its own may be of other
            kernels; that the graph is the same the outline tells in more detail.

    Raises:
        Nameless: if it can't be written down.
    """

    def __init__(self, evaluated: Evaluated, beside: Leaves, work: Work, graph: int = 0) -> None:
        own, sources, out = evaluated
        recorder = own.recorder
        if not HOOKING.isdisjoint(recorder.operations) or recorder.moves_unseen:
            raise Nameless("the next evaluation may have another graph")
        reads = own.reads(sources.arguments)
        attends = may_attend(recorder.operations)
        watched = own.is_watched
        self.reads = reads._replace(attends=attends, is_watched=watched, steps=Steps())
        # without layers parameters are read where autograd has saved them alone
        self._layers = [*self.reads.operations] if isinstance(recorder, UseRecorder) else []
        leaves = self._leaves(sources, (out, *beside))
        self._like: Callable[[Leaves], Leaves] = tuple

        def made() -> Leaves:
            result = swept(evaluated, beside, work)
            self._like = getattr(result, "like", tuple)
            return result

        self._outline, owners = outline(out, own.starts, own.first, sources), sources.owners or ()
        if owners and (recorder.reads_values or recorder.apart):
            raise Nameless("code of a user's may look at what another evaluation has left")
        self._work = WrittenWork(made, leaves, owners)
        self._fingerprints = list(map(fingerprint, leaves))
        recorder.graph = self._graph = graph
        self._signature = recorder.signature
        self._kinds = sources.kinds

    def fits(self, evaluated: Evaluated, beside: Leaves, expected: Leaves) -> bool:
        """Is the result of another evaluation at the same numbers the one that is expected?

        No uses are looked for in that. From then on the sweep holds for evaluations like it.
        """
        own, sources, out = evaluated
        leaves = self._leaves(sources, (out, *beside))
        if list(map(fingerprint, leaves)) != self._fingerprints:
            return False
        self._outline = outline(out, own.starts, own.first, sources)
        self._work.hold_for(leaves)
        if self._outline is None or not self.holds_for(evaluated):
            return False
        if isinstance(recorder := own.recorder, Following):
            self.reads = self.reads._replace(steps=recorder.known())
        results = self.replayed(sources, out, beside)
        return results is not None and agree(results, expected)

    def holds_for(self, evaluated: Evaluated) -> bool:
        """Is an evaluation like the one that was written down?"""
        own, sources, out = evaluated
        own.recorder.graph = self._graph
        if own.recorder.signature != self._signature or sources.kinds != self._kinds:
            return False
        return outline(out, own.starts, own.first, sources) == self._outline

    def replayed(self, sources: Sources, out: Tensor, beside: Leaves) -> Leaves | None:
        """The result of an evaluation that it holds for; None if tensors are not as they were."""
        if not sources.are_as_saved:
            return None
        owners = sources.owners or ()
        result = self._work.result(self._leaves(sources, (out, *beside)), owners)
        if owners and not sources.are_as_saved:  # code of users' own may write
            return None
        return None if result is None else self._like(result)

    def _leaves(self, sources: Sources, others: Leaves) -> Leaves:
        """All that the work may read, in one order for all evaluations of the kind."""
        arguments = map(sources.arguments.get, self._layers, repeat(()))
        return (*sources.saved, *chain.from_iterable(arguments), *others)


class Evaluator(SettledModule, Protocol):
    """A module at a batch of a settled kind, which is evaluated again."""

    is_alone: bool
    is_watched: bool
    splits: bool
    learned: LearnedUses
    graph: int
    """The number of the graph of the evaluation that was made last without a sweep."""

    def repeated(
        self,
        state: ModuleState,
        given: Given,
        sources: Sources | None = None,
        reads: Reads | None = None,
    ) -> RepeatedEvaluation:
        """What the module gets in one more evaluation."""

    def run(
        self,
        state: ModuleState,
        given: Given,
        own: RepeatedEvaluation,
        recorder: AbstractContextManager[object],
    ) -> Tensor | None:
        """What the module returns; None if it is not like what it has returned before."""


def swept(evaluated: Evaluated, beside: Leaves, work: Work) -> Leaves:
    """What a work makes of an evaluation in which uses of parameters were looked for."""
    own, _, out = evaluated
    with recording():
        jacobian = own.jacobian(out, None)
    if jacobian is None or jacobian.derived:
        raise Nameless("parameters are used otherwise")
    return work(jacobian, beside)


def evaluated_with_sources(
    settled: Evaluator, state: ModuleState, given: Given, reads: Reads | None = None
) -> Evaluated | None:
    """An evaluation of which all is kept that a sweep may read; None if it returns otherwise.

    Args:
        reads: what is known of the operations that use parameters; else they are looked for.

    Raises:
        UnseenWrite: if a parameter that is no copy was written into.
    """
    if settled.names and state.hooks():
        return None
    # by parameters such a node may look at a module as the evaluation has left it
    owners: list[Any] | None = [] if settled.splits and not settled.names else None
    attends, sources = reads is None or reads.attends, Sources(owners=owners)
    with recording(), MathAttention() if attends else NOTHING:
        own = settled.repeated(state, given, sources, reads)
        with sources.saving():
            out = settled.run(state, given, own, own.recorder)
    own.check_unwritten()
    if out is None:
        return None
    is_read = own.recorder.reads_values or own.recorder.apart
    is_told = settled.is_alone or not is_read or are_alone(settled, state, given, out, own.recorder)
    return (own, sources, out) if is_told else None
