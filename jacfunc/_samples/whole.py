"""Batches evaluated as a whole, as their owner does: samples are separated in the sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from jacfunc._calls import FlatCall
from jacfunc._errors import RANDOM, Refused
from jacfunc._factored import FactoredJacobian, LearnedUses, WholeBatch, factored
from jacfunc._layouts import (
    Evidence,
    Key,
    Layout,
    Mixing,
    NoLayout,
    PlainSamples,
    Trace,
    Unlike,
    copy_written,
    may_mix,
    mixes_unseen,
)
from jacfunc._linear_map import JacobianOperator, Samples
from jacfunc._log import note
from jacfunc._memory import give_back
from jacfunc._rounding import are_near
from jacfunc._samples.halves import PulledGroups
from jacfunc._torch import RandomState, noise_like
from jacfunc._types import Leaves

WholeCall: TypeAlias = Callable[[Leaves], tuple[FlatCall, Mapping[int, int]]]
"""The call of some samples at once; and for each primal that holds samples the number of its leaf
among the tensors of these samples."""

PULLED_ROUNDING = 0.3
"""What two batches pull back to a sample differs by less than this power of the precision."""

Evaluated: TypeAlias = tuple[FactoredJacobian, FlatCall]
"""Some samples, evaluated, and the call that was made."""


@dataclass(eq=False)
class WholeBatches:
    """A batch that is evaluated as a whole.

    To learn where its tensors hold the samples, it is evaluated beside another batch: one of its
    samples alone, or all of them twice where one sample alone calls other operations.

    Args:
        call_of: makes the call of some samples.
        samples: the samples of the batch.
        learned: what earlier evaluations have shown.
        random_state: as every evaluation finds it.
        may_draw: may the batch draw random numbers?
    """

    call_of: WholeCall
    samples: Samples
    learned: LearnedUses
    random_state: RandomState
    may_draw: bool

    def factored(self) -> Evaluated:
        """All samples, evaluated.

        Raises:
            Refused: if the tensors of the batch do not hold the samples in one dimension, or if
                its backward pass is not that of each sample alone.
        """
        learned, size, is_first = self.learned, self.samples.size, not self.learned.lessons
        if size == 1 or (learned.sites is not None and not learned.moves_samples):
            result = self._as_learned()
            if result and (size == 1 or not learned.moves_samples):
                return result
        for numbers, leaves in self.samples.others(learned.lessons):
            trace, other = self._trace(numbers, leaves)
            before = learned.copy()
            result, is_like = self._learned_from(trace, other)
            if result or is_like:
                break
            learned.restore(before)
            note("a batch of other samples is looked at: those calls other operations")
        del trace, other, leaves
        if is_first:  # later lessons take the same pages again
            give_back()  # or what was taken would lie beside the result
        if not result:
            raise Refused("its tensors do not hold the samples in one dimension")
        return result

    def learn_mixing(self, signature: int) -> None:
        """Learn, once for each signature, whether operations of plain evaluations mix samples."""
        learned = self.learned
        if not (learned.mixes or signature in learned.signatures | learned.looked_at):
            others = self.samples.others(learned.lessons)
            mixes = may_mix(self._evaluate, self.samples.leaves, self.samples.size, others)
            learned.mixes = mixes and not self.random_state.has_changed()
            learned.looked_at.add(signature)

    def _evaluate(self, leaves: Leaves) -> None:
        self.random_state.repeat()
        call, _ = self.call_of(leaves)
        JacobianOperator(call, call.primals).image()

    def _as_learned(self) -> Evaluated | None:
        """An evaluation that knows the layouts; None if it calls operations that are not learned.

        Raises:
            Refused: if it draws and must not.
        """
        learned, size = self.learned, self.samples.size
        batch, call = self._batch(self.samples, PlainSamples(size, learned.sites or {}))
        try:
            jacobian = factored(batch, learned, self.random_state.repeat)
        except Unlike:
            return None
        self._check_random()
        learned.moves_samples = learned.moves_anew(jacobian)
        is_known = size == 1 or jacobian.signature in learned.signatures
        return (jacobian, call) if is_known else None

    def _learned_from(self, trace: Trace, other: FactoredJacobian) -> tuple[Evaluated | None, bool]:
        """An evaluation beside another batch, and whether that calls the same operations."""
        learned, size = self.learned, self.samples.size
        mixing = Mixing(trace, size)
        placing = PlainSamples(size, {}, trace, mixing)
        batch, call = self._batch(self.samples, placing)
        while True:
            try:
                jacobian = factored(batch, learned, self.random_state.repeat)
                break
            except NoLayout as error:
                if error.numbers <= learned.others or not trace.is_like(placing.operations):
                    return None, trace.is_like(placing.operations)
                learned.others |= error.numbers
        self._check_random()
        if not trace.is_like(placing.operations):
            return None, False
        learned.moves_samples = learned.moves_anew(jacobian)
        # of numbers that are drawn nothing can be told
        learned.mixes |= mixing.was_seen and not self.random_state.has_changed()
        if self._learn(jacobian, placing, other):
            return (jacobian, call), True
        return self._as_learned(), True

    def _trace(self, numbers: list[int], leaves: Leaves) -> tuple[Trace, FactoredJacobian]:
        """The operations of another batch, and what it was evaluated to."""
        trace, learned = Trace(numbers), self.learned
        batch, _ = self._batch(replace(self.samples, leaves=leaves), PlainSamples(len(numbers), {}))
        own = LearnedUses(set(learned.others), set(learned.written))
        every = self._evaluate, self.samples.leaves, self.samples.size, Trace(numbers), leaves
        learned.mixes = learned.mixes or mixes_unseen(*every)
        jacobian = factored(replace(batch, trace=trace), own, self.random_state.repeat)
        copy_written(trace, self._evaluate, leaves)
        return trace, jacobian

    def _batch(self, samples: Samples, placing: PlainSamples) -> tuple[WholeBatch, FlatCall]:
        call, leaf_of = self.call_of(samples.leaves)
        every, count = samples.dims, len(call.primals)
        dims = [every[leaf_of[n]] if n in leaf_of else None for n in range(count)]
        return WholeBatch(call, call.primals, dims, placing.size, placing), call

    def _check_random(self) -> None:
        if not self.may_draw and self.random_state.has_changed():
            raise Refused(RANDOM)

    def _learn(
        self, jacobian: FactoredJacobian, placing: PlainSamples, other: FactoredJacobian
    ) -> bool:
        """Learn the layouts from an evaluation; False if they are others than it was made with."""
        learned, size, trace = self.learned, jacobian.size, placing.trace
        assert trace is not None
        is_random = self.random_state.has_changed()
        learned.lessons += 1
        noises = noise_like(jacobian.outputs, seed=learned.lessons)
        pulled = PulledGroups(jacobian, noises)
        evidence = Evidence(placing.seen, size)
        if not is_random:  # of numbers that are drawn nothing can be told
            evidence = evidence.by_numbers(trace.samples)
        for inside, products in pulled.groups():
            of_uses = zip(jacobian.uses, products, strict=False)
            evidence = evidence.by_cotangents(inside, {use.key: x for use, x in of_uses})
            del products, of_uses  # or they would stay beside the next ones
        sites, unknown = evidence.sites()
        if any(number < 0 for number in unknown):
            raise Refused("what it returns for a sample changes with the batch")
        layouts = {key: site.layout for key, site in sites.items() if site is not None}
        every: dict[Key, Tensor] = {}
        for inside, products in pulled.groups():
            rows = _rows(jacobian, products, layouts, size)
            every = every or {key: x[:1] for key, x in rows.items()}
            _check_each_alone(rows, inside, every)
            del products, rows
        if not is_random:
            own = {key: x[:, trace.samples] for key, x in every.items()}
            _check_near(own, _rows_of_other(other, noises, layouts, trace.samples))
        learned.learn_sites(sites, jacobian.signature)
        others = jacobian.params_of(unknown)
        learned.others |= others
        first = {key: seen.layouts[0] for key, seen in placing.seen.items()}
        return not others and all(
            site is None or site.layout == first[key] for key, site in sites.items()
        )


def _rows(
    jacobian: FactoredJacobian, products: Leaves, layouts: Mapping[Key, Layout | None], size: int
) -> dict[Key, Tensor]:
    """What is pulled back to each operation and input, ``[K, B, *z]``."""
    uses = zip(jacobian.uses, products, strict=False)
    places = ((use.key, layouts.get(use.key), product) for use, product in uses)
    rows = {key: layout.of_all(x, size, 1) for key, layout, x in places if layout is not None}
    direct = zip(jacobian.direct, products[len(jacobian.uses) :], strict=True)
    inputs = {(d.number, "in"): x.movedim(d.dim + 1, 1) for d, x in direct if d.dim is not None}
    return rows | inputs


def _rows_of_other(
    other: FactoredJacobian,
    noises: Leaves,
    layouts: Mapping[Key, Layout | None],
    samples: list[int],
) -> dict[Key, Tensor]:
    """What the same cotangents are pulled back to in another batch; none if they do not fit."""
    pairs = [(noise[samples], out) for noise, out in zip(noises, other.outputs, strict=True)]
    if not all(len(samples) == 1 or seed.shape == out.shape for seed, out in pairs):
        return {}
    cotangents = tuple(seed.reshape(1, *out.shape) for seed, out in pairs)
    return _rows(other, other.linearization.pull_batch(cotangents), layouts, len(samples))


def _check_each_alone(
    rows: Mapping[Key, Tensor], inside: Tensor, every: Mapping[Key, Tensor]
) -> None:
    """Refuse a backward pass that is another one for a sample if the others have no cotangents."""
    for key, some in rows.items():
        mask = inside.to(some.device).reshape(*inside.shape, *(1,) * (some.dim() - 2))
        _check_near({key: some.where(mask, every[key])}, {key: every[key].expand_as(some)})


def _check_near(rows: Mapping[Key, Tensor], others: Mapping[Key, Tensor]) -> None:
    for key in rows.keys() & others.keys():
        if not are_near(rows[key], others[key], PULLED_ROUNDING):
            raise Refused(
                "its backward pass is another one for a sample alone: a hook or a rule of its own "
                "looks at the cotangents of other samples, or at their number"
            )
