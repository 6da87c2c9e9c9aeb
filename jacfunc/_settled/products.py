"""Products with the Jacobian of a whole batch, once many of a kind were taken: written down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian
from jacfunc._faults import is_unwatched
from jacfunc._lending import ModuleState, Version
from jacfunc._log import note
from jacfunc._products import PointProducts
from jacfunc._remembered import Remembered
from jacfunc._rounding import agree
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import ALONE, SettledBatch
from jacfunc._settled.reads import Reads
from jacfunc._settled.sources import MOST_BYTES, Sources
from jacfunc._settled.sweeps import FEWEST_CALLS, MOST_MISSES, Sweep, evaluated_with_sources
from jacfunc._torch import RandomState, is_undisturbed
from jacfunc._trees import Given
from jacfunc._types import Leaves

Written: TypeAlias = tuple[SettledBatch, Sweep, Sweep]
"""A batch of a settled kind, and the sweeps for a product with J and one with its transpose."""


class KnownProducts:
    """Products at batches of one kind: how many were taken, and the sweeps once these are known.

    A batch is evaluated as one sample is: samples may be coupled, and no layer is looked for.

    Args:
        are_counted: else they are never written down.
    """

    @classmethod
    def of(cls, version: Version, given: Given) -> KnownProducts:
        """What is known of products with a version of a module at such a batch."""
        return _known().get_or_make(version, given.kind, cls)

    def __init__(self, are_counted: bool = True) -> None:
        self.are_counted, self.calls = are_counted, 0
        self._written: Written | None = None

    @property
    def settled(self) -> SettledBatch | None:
        """The batch, once products are written down; None where that does not hold."""
        if self._written is None or self._written[0].misses >= MOST_MISSES:
            return None
        return self._written[0]

    def learn(self, at_batch: AtBatch, tangents: Leaves, products: PointProducts) -> None:
        """Write down how products with J and its transpose are made, if that can be.

        Args:
            tangents: one vector, ``[1, *param]``.
            products: those of the point, taken otherwise.
        """
        if sum(x.nbytes for x in tangents) > MOST_BYTES:
            return
        pushed = products.pushforward_batch(tangents)
        pulled = products.pullback_batch(pushed)
        every = [tuple([x[0].detach() for x in leaves]) for leaves in (tangents, pushed, pulled)]
        with at_batch.undisturbed():
            self._written = _written(at_batch, *every)

    def at(
        self, state: ModuleState, given: Given, random_state: RandomState
    ) -> WrittenPoint | None:
        """A point, evaluated while the module is lent; None where the sweeps do not hold."""
        assert self._written is not None
        settled, push, pull = self._written

        def made() -> WrittenPoint | None:
            evaluated = evaluated_with_sources(settled, state, given, push.reads)
            if evaluated is None or not push.holds_for(evaluated):
                return None
            own, sources, out = evaluated
            sources.arguments.clear()  # they are compared now, and would be kept with the point
            return None if own.recorder.reads_values else WrittenPoint(push, pull, sources, out)

        try:
            return settled.tried(made, random_state)
        except UnseenWrite:
            push.reads = Reads({}, set())  # later evaluations get copies again
            raise


class WrittenPoint(NamedTuple):
    """What a batch was evaluated to, and the sweeps that take products there.

    Args:
        push: takes products with J.
        pull: takes products with its transpose.
        sources: what the sweeps read.
        output: what the module has returned, with a graph that has no tensors.
    """

    push: Sweep
    pull: Sweep
    sources: Sources
    output: Tensor


class AtBatch(Protocol):
    """A module at a batch, lent when something is asked of it."""

    call: Any
    """With the state of the module."""
    given: Given | None
    """What it is given, if that is plain."""
    random_state: RandomState

    @property
    def batch(self) -> SampledCall:
        """The call at all samples."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around evaluations, all of which draw the same numbers."""


class ProductsAgain:
    """Products with J and its transpose at one point, of a kind that others have settled.

    Args:
        at_batch: the point.
        known: what others have settled.
    """

    def __init__(self, at_batch: AtBatch, known: KnownProducts) -> None:
        self._at_batch, self._known = at_batch, known
        self._point: WrittenPoint | None = None
        self._outputs: Leaves = ()
        """Of an evaluation with a graph, if there was one: all must return the same."""
        self._is_tried = False

    @property
    def output(self) -> Tensor | None:
        """What the module returns; None where products are not written down."""
        point = self._evaluated()
        return None if point is None else point.output.detach()

    def _evaluated(self) -> WrittenPoint | None:
        """The point, evaluated once; None where products are not written down."""
        known, at_batch, given = self._known, self._at_batch, self._at_batch.given
        if given is None or self._is_tried or known.settled is None or not is_undisturbed():
            return self._point
        self._is_tried = True
        with at_batch.undisturbed():
            point = known.at(at_batch.call.state, given, at_batch.random_state)
        if point is not None and agree(self._outputs, (point.output,)):
            self._point = point
        return self._point

    def product(self, tangents: Leaves, weigh: Callable[[Leaves], Leaves]) -> Leaves | None:
        """``Jᵀ weigh(J v)`` of one vector, ``[1, *param]``; None where it is not written down.

        Raises:
            ValueError: if tensors have changed that are no copies.
        """
        point = self._evaluated() if is_undisturbed() else None
        if point is None:
            return None
        push, pull, sources, out = point
        originals = self._at_batch.call.state.originals
        if originals is not None:
            originals.check(self._at_batch.call.api)
        with torch.no_grad():
            pushed = push.replayed(sources, out, tuple([v[0] for v in tangents]))
            if pushed is None:
                return None
            (weighed,) = weigh((pushed[0][None],))
            pulled = pull.replayed(sources, out, (weighed[0],))
        return None if pulled is None else tuple([x[None] for x in pulled])

    def learn(self, tangents: Leaves, products: PointProducts, outputs: Leaves) -> None:
        """Count a product of one vector, taken otherwise; after some, write down how it is taken.

        Args:
            products: those with J and its transpose at the point.
            outputs: of the evaluation that they are taken from.
        """
        self._outputs = outputs
        known, are_behind = self._known, self._at_batch.call.output_dims.dims
        if are_behind or not (known.are_counted and is_undisturbed()):
            return
        known.calls += 1
        if known.calls == FEWEST_CALLS:
            try:
                known.learn(self._at_batch, tangents, products)
            except Exception as error:  # products are taken as before
                note("products of a kind of call are not written down: %s", error)


def _written(
    at_batch: AtBatch, tangents: Leaves, cotangents: Leaves, pulled: Leaves
) -> Written | None:
    """Sweeps for a product with J, of which these cotangents came, and for one of these.

    Raises:
        Nameless: if they can't be written down.
    """
    state, given, batch = at_batch.call.state, at_batch.given, at_batch.batch
    assert given is not None
    names, (output,) = tuple(state.point), cotangents
    is_watched = not is_unwatched(at_batch.call.flat_call(), ALONE)
    settled = SettledBatch(batch, names, output, is_watched, by_layers=False)
    settled.is_alone = True  # as one sample is, by the parameters as they are
    settled.is_batchable = False  # one cotangent is pulled back at a time
    first = evaluated_with_sources(settled, state, given)
    # what Python reads may lead a batch another way than its samples, which others look for
    if first is None or first[0].recorder.reads_values:
        return None
    push = Sweep(first, tangents, _pushed)
    pull = Sweep(first, cotangents, _pulled)
    second = evaluated_with_sources(settled, state, given, push.reads)
    if second is None or not push.fits(second, tangents, cotangents):
        return None
    return (settled, push, pull) if pull.fits(second, cotangents, pulled) else None


def _pushed(jacobian: FactoredJacobian, tangents: Leaves) -> Leaves:
    """``J v``: the pullback of the pullback, which is linear in its cotangents."""
    linearization: Any = jacobian.linearization
    products: Leaves = linearization.transpose(False).pull(tangents)
    return products


def _pulled(jacobian: FactoredJacobian, cotangents: Leaves) -> Leaves:
    """``Jᵀ u``."""
    linearization: Any = jacobian.linearization
    products: Leaves = linearization.pull(cotangents)
    return products


@cache
def _known() -> Remembered[KnownProducts]:
    """What is known of products with each version of a module, by the kind of what it is given."""
    return Remembered()
