"""Products at batches of one kind, once many were taken: how they are made, written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian
from jacfunc._faults import is_unwatched
from jacfunc._lending import Version
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._memory import sparing
from jacfunc._remembered import Remembered
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import ALONE, SettledBatch
from jacfunc._settled.following import Reads
from jacfunc._settled.sweeps import MOST_WORKS, Sweep, Work, evaluated_with_sources
from jacfunc._settled.works import Whole
from jacfunc._torch import RandomState
from jacfunc._traces import MOST_BYTES, MOST_MISSES, Sources
from jacfunc._trees import Given
from jacfunc._types import Leaves

ResultT = TypeVar("ResultT")

Steps: TypeAlias = tuple[Work, ...]
"""Works that make a product one after the other."""

Pairs: TypeAlias = Sequence[tuple[Leaves, Leaves]]
"""What each of the steps takes beside the batch, and what it makes of that."""


def pushed(jacobian: FactoredJacobian, tangents: Leaves) -> Leaves:
    """``J v``: the pullback of the pullback, which is linear in its cotangents."""
    linearization: Any = jacobian.linearization
    products: Leaves = linearization.transpose(False).pull(tangents)
    return products


def pulled(jacobian: FactoredJacobian, cotangents: Leaves) -> Leaves:
    """``Jᵀ u``."""
    linearization: Any = jacobian.linearization
    products: Leaves = linearization.pull(cotangents)
    return products


APART: Steps = pushed, pulled
"""A product with J, and one with its transpose."""


class KnownProducts:
    """Products at batches of one kind: how many were taken, and the sweeps once these are known.

    A batch is evaluated as one sample is: samples may be coupled, and no layer is looked for.

    Args:
        are_counted: else they are never written down.
    """

    @classmethod
    def of(cls, version: Version, kind: Hashable) -> KnownProducts:
        """What is known of products with a version of a module at a batch of such a kind."""
        return _known().get_or_make(version, kind, cls)

    def __init__(self, are_counted: bool = True) -> None:
        self.are_counted, self.calls = are_counted, Counter[Steps]()
        self.sweeps: dict[Steps, list[Sweep]] = {}
        self._wholes: dict[Steps, Whole] = {}
        self._batch: SettledBatch | None = None

    @property
    def settled(self) -> SettledBatch | None:
        """The batch, once products are written down; None where that does not hold."""
        if self._batch is None or self._batch.misses >= MOST_MISSES:
            return None
        return self._batch

    def learn(self, at_batch: AtBatch, steps: Steps, pairs: Pairs, output: Tensor) -> bool:
        """Write down how a product was made, and say whether that can be.

        Args:
            pairs: of a product of one vector that was taken otherwise.
            output: what the module returned.
        """
        if len(self.sweeps) >= MOST_WORKS or sum(x.nbytes for x in pairs[0][0]) > MOST_BYTES:
            return False
        try:
            with at_batch.undisturbed():
                written = _written(at_batch, steps, pairs, output)
                if written is not None and len(steps) == 1:
                    self._write_whole(at_batch, written[0], steps, *pairs[0])
        except Exception as error:  # products are taken as before
            note("products of a kind of call are not written down: %s", error)
            return False
        if written is not None:
            self._batch, self.sweeps[steps] = written
        return written is not None

    def _write_whole(
        self, at_batch: AtBatch, settled: SettledBatch, steps: Steps, beside: Leaves, result: Leaves
    ) -> None:
        """Write a product down with the evaluation, if torch's own layers alone run in that."""
        state, given, (work,) = at_batch.call.state, at_batch.given, steps
        assert given is not None

        def made(jacobian: FactoredJacobian, beside: Leaves) -> Leaves:
            return (*work(jacobian, beside), jacobian.outputs[0].detach())

        whole = Whole.written(settled, state, given, beside, made, result)
        if whole is not None:
            self._wholes[steps] = whole

    def at_once(self, at_batch: AtBatch, steps: Steps, beside: Leaves) -> Leaves | None:
        """A product and what the module returns, in one go; None where it must be evaluated."""
        whole, state, given = self._wholes.get(steps), at_batch.call.state, at_batch.given
        if whole is None or self.settled is None or given is None or state.hooks():
            return None
        if state.casting is not None and not state.casting.is_now():
            return None
        return whole.result(state, given, beside)

    def at(self, at_batch: AtBatch, sweeps: Sequence[Sweep]) -> WrittenPoint | None:
        """A point, evaluated while the module is lent for it; None where sweeps do not hold."""
        state, given, settled, first = at_batch.call.state, at_batch.given, self.settled, sweeps[0]
        if settled is None or given is None:
            return None

        def made() -> WrittenPoint | None:
            evaluated = evaluated_with_sources(settled, state, given, first.reads)
            if evaluated is None or not first.holds_for(evaluated):
                return None
            own, sources, out = evaluated
            return None if own.recorder.reads_values else WrittenPoint(sweeps, sources, out)

        try:
            return lent_again(at_batch, settled, made)
        except UnseenWrite:
            first.reads = Reads({}, set())  # later evaluations get copies again
            raise


class WrittenPoint(NamedTuple):
    """What a batch was evaluated to, and the sweeps that take products there.

    Args:
        sweeps: make a product one after the other.
        sources: what these read.
        output: what the module has returned, with a graph that has no tensors.
    """

    sweeps: Sequence[Sweep]
    sources: Sources
    output: Tensor

    def made(self, step: int, beside: Leaves) -> Leaves | None:
        """What a step makes; None if tensors are not as they were."""
        return self.sweeps[step].replayed(self.sources, self.output, beside)


class AtBatch(Protocol):
    """A module at a batch, lent when something is asked of it."""

    call: Any
    """With the state of the module."""
    given: Given | None
    """What it is given, if that is plain."""
    random_state: RandomState
    """As it was when the call began: every evaluation draws the same numbers."""

    @property
    def batch(self) -> SampledCall:
        """The call at all samples."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around evaluations, all of which draw the same numbers."""


def lent_again(
    at_batch: AtBatch, settled: SettledBatch, make: Callable[[], ResultT | None]
) -> ResultT | None:
    """What is made of a settled batch, for which alone the module is lent.

    None if it fails, or draws numbers: then it must be taken anew, as if nothing was settled.
    """
    call, random_state = at_batch.call, at_batch.random_state
    tensors = at_batch.given.tensors if at_batch.given else ()
    with alone(), sparing(call.independence.memory):
        now = RandomState(tensors)
        random_state.repeat()
        try:
            lent = call.state.lent_for_call(call.api, settled.names)
            with torch.set_grad_enabled(False), lent:
                return settled.tried(make, random_state)
        finally:
            now.repeat()


def _written(
    at_batch: AtBatch, steps: Steps, pairs: Pairs, output: Tensor
) -> tuple[SettledBatch, list[Sweep]] | None:
    """A batch, and the sweeps that make a product there.

    Raises:
        Nameless: if they can't be written down.
    """
    state, given, batch = at_batch.call.state, at_batch.given, at_batch.batch
    if given is None:
        return None
    is_watched = not is_unwatched(at_batch.call.flat_call(), ALONE)
    settled = SettledBatch(batch, tuple(state.point), output, is_watched, by_layers=False)
    settled.is_alone = True  # as one sample is, by the parameters as they are
    settled.is_batchable = False  # one cotangent is pulled back at a time
    evaluated = evaluated_with_sources(settled, state, given)
    # what Python reads may lead a batch another way than its samples, which others look for
    if evaluated is None or evaluated[0].recorder.reads_values:
        return None
    pair = zip(steps, pairs, strict=True)
    sweeps = [Sweep(evaluated, beside, work) for work, (beside, _) in pair]
    del evaluated  # before there is another one
    evaluated = evaluated_with_sources(settled, state, given, sweeps[0].reads)
    if evaluated is None:
        return None
    fit = [sweep.fits(evaluated, *pair) for sweep, pair in zip(sweeps, pairs, strict=True)]
    return (settled, sweeps) if all(fit) else None


@cache
def _known() -> Remembered[KnownProducts]:
    """What is known of products with each version of a module, by the kind of what it is given."""
    return Remembered()
