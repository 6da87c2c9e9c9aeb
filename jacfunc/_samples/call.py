"""The call of a function or a module at many samples, and the ways to evaluate them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeAlias

from jacfunc._calls import FlatCall
from jacfunc._errors import Refused, Stale, UnseenWrite, is_out_of_memory
from jacfunc._factored import Direct, FactoredJacobian, LearnedUses, VmappedBatch, factored
from jacfunc._layouts import ROUNDING, WhatWasSeen
from jacfunc._linear_map import Samples, narrowed, one_sample
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._remembered import CallKind
from jacfunc._samples.one import ALONE_ROUNDING, EachSample, OneSample, check_each_alone
from jacfunc._samples.whole import Evaluated, WholeBatches, WholeCall
from jacfunc._torch import RandomState, is_outermost
from jacfunc._types import Leaves

Way: TypeAlias = Callable[[int, int, RandomState], Evaluated]
"""Evaluates the samples from start to stop, which draw from this state of the generators."""

Guard: TypeAlias = Callable[[int, bool], bool]
"""Refuses an evaluated batch whose samples depend on each other. It is called with the signature of
the operations, and with whether other numbers may make these operations mix the samples. It returns
the latter, unless the user has said that samples do not depend on each other."""


@dataclass(eq=False)
class SampledCall:
    """The call of a function or a module at many samples.

    Args:
        call_of: makes the call of a single sample from the tensors of that sample.
        samples: the tensors of all samples.
        kind: the identity of the whole call.
        whole: makes the call of all samples at once, where the function is made for batches.
        is_whole: may the batch be evaluated so? Buffers that it leaves are not each sample's own.
        guard: is called with each batch that was evaluated as a whole.
        differentiates: is it differentiated by parameters, and by inputs?
    """

    api: str
    call_of: Callable[[Leaves], FlatCall]
    samples: Samples
    kind: CallKind
    whole: WholeCall | None = None
    is_whole: bool = True
    guard: Guard | None = None
    differentiates: tuple[bool, bool] = (True, False)
    size: int = field(init=False)
    """How many samples there are."""

    def __post_init__(self) -> None:
        self.size = self.samples.size

    @property
    def differentiates_inputs_alone(self) -> bool:
        """Has every sample primals of its own alone, so that there are no parameters?"""
        return self.differentiates == (False, True)

    def factors(self, start: int, stop: int) -> Evaluated:
        """The samples from start to stop, evaluated, and a call that knows the trees.

        They are evaluated as a whole, if all uses of parameters have rules and no random numbers
        are drawn; else under vmap; else as a whole, and one by one for the parameters without
        rules; else one by one alone. What was refused once is not tried again for calls of this
        kind.

        Raises:
            Refused: if the samples do not even run one by one.
        """
        if start == stop:  # a sample of zeros shows the shapes of what there would be
            call = self.call_of_sample(0)
            return FactoredJacobian(0, (), (), call.primals, EachSample.none(call)), call
        if not is_outermost():
            return self._in_words(self._vmapped, start, stop, self.random_state())
        random_state = self.random_state()
        refused = LearnedUses.of(self.kind).refused
        *others, last = [way for way in self._ways() if _name(way) not in refused]
        with alone():
            for way in others:
                try:
                    return way(start, stop, random_state)
                except Exception as error:  # a way may fail by whatever the function raises
                    if is_out_of_memory(error) or self._is_final(error):
                        raise
                    note("samples are not evaluated %s: %s", _name(way), error)
                    refused.add(_name(way))
                random_state.repeat()
            return self._in_words(last, start, stop, random_state)

    def _in_words(self, way: Way, start: int, stop: int, random_state: RandomState) -> Evaluated:
        """The samples by a way that is the last; its refusal is in words of the door."""
        try:
            return way(start, stop, random_state)
        except (RuntimeError, Refused) as error:
            self.check_randomness(error)
            if not isinstance(error, Refused) or str(error).startswith(f"{self.api}: "):
                raise
            raise Refused(
                f"{self.api}: samples must be such that each can be differentiated alone, got a "
                f"refusal: {error}. Write the function in other operations."
            ) from error

    def _ways(self) -> list[Way]:
        """The ways to evaluate samples, the cheapest first."""
        if self.whole is None or not self.is_whole:
            return [self._under_vmap, self._one_by_one]
        ways: list[Way] = [self._as_a_whole, self._under_vmap]
        if self.samples.randomness == "different":
            ways.append(self._drawing)
        return [*ways, self._mixed, self._one_by_one]

    def _as_a_whole(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        return self._ruled(start, stop, random_state, may_draw=False)

    def _drawing(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        return self._ruled(start, stop, random_state, may_draw=True)

    def _ruled(self, start: int, stop: int, random_state: RandomState, may_draw: bool) -> Evaluated:
        """Samples evaluated as a whole, if all uses of parameters have rules."""
        learned, is_one = self.learned_as_a_whole, stop - start == 1
        if not learned.others or is_one:
            jacobian, call = self._whole(start, stop, random_state, may_draw)
            if not learned.others or is_one:
                return jacobian, call
        raise Refused("operations without a rule use parameters")

    def _mixed(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        jacobian, call = self._whole(start, stop, random_state, may_draw=False)
        if stop - start == 1:  # autograd differentiates one sample by all parameters
            return jacobian, call
        others = sorted(self.learned_as_a_whole.others)
        rest, _ = self._each(start, stop, random_state, others)
        return replace(jacobian, rest=(rest, [Direct(number) for number in others])), call

    def _whole(self, start: int, stop: int, random_state: RandomState, may_draw: bool) -> Evaluated:
        assert self.whole is not None
        leaves = narrowed(self.samples.leaves, self.samples.dims, start, stop)
        is_every = leaves is self.samples.leaves
        samples = self.samples if is_every else replace(self.samples, leaves=leaves)
        batch = WholeBatches(self.whole, samples, self.learned_as_a_whole, random_state, may_draw)
        jacobian, call = batch.factored()
        if alone := range(jacobian.size) if jacobian.reads_values else sorted(jacobian.apart):
            self.check_alone(jacobian.outputs, start, numbers=alone)
        self._call_guard(jacobian, () if random_state.has_changed() else jacobian.outputs, start)
        return jacobian, call

    def check_plain(self, seen: WhatWasSeen, outputs: Leaves) -> None:
        """Refuse samples that depend on each other, after a plain evaluation of all.

        That recorded no tensors: another evaluation tells whether operations may mix samples.
        """
        if self.whole is not None and self.guard is not None:
            known = self.samples, self.learned_as_a_whole, self.random_state()
            WholeBatches(self.whole, *known, may_draw=True).learn_mixing(seen.signature)
            self._call_guard(seen, outputs)

    def _call_guard(self, seen: WhatWasSeen, outputs: Leaves, start: int = 0) -> None:
        learned = self.learned_as_a_whole
        may_mix = learned.moves_anew(seen) or (learned.mixes and not seen.reads_values)
        if self.guard and self.guard(seen.signature, may_mix) and outputs:
            if not seen.reads_values:  # a sample may decide for all, while halves are alike
                self.check_alone(outputs, start, ROUNDING)
            learned.learn_moves(seen)

    def check_alone(
        self,
        outputs: Leaves,
        start: int = 0,
        power: float = ALONE_ROUNDING,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Raise Refused unless each sample alone, whose numbers may choose, has these outputs."""
        rows = range(len(outputs[0])) if numbers is None else numbers
        calls = {row: partial(self.call_of_sample, start + row) for row in rows}
        check_each_alone(calls, self.random_state(), outputs, power)

    def _vmapped(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        one, every = OneSample(self.api, self.call_of), self.samples
        samples = replace(every, leaves=narrowed(every.leaves, every.dims, start, stop))
        call = self.call_of_sample(0)
        primals: Leaves = call.primals
        own: Mapping[int, int] = {}
        if self.whole is not None:
            of_all, own = self.whole(samples.leaves)
            primals = of_all.primals
        with alone():
            batch = VmappedBatch(one.of_params, call, primals, samples, own)
            return factored(batch, LearnedUses.of(self.kind), random_state.repeat), one.call

    def _under_vmap(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        jacobian, call = self._vmapped(start, stop, random_state)
        learned = LearnedUses.of(self.kind)
        if not learned.is_pulled:  # checkpoints run again in a pullback alone, and fail there
            jacobian.parts_of_rows(0, 1, 0)
            learned.is_pulled = True
        return jacobian, call

    def _one_by_one(self, start: int, stop: int, random_state: RandomState) -> Evaluated:
        direct = [Direct(number) for number in range(len(self.call_of_sample(0).primals))]
        each, call = self._each(start, stop, random_state, range(len(direct)))
        return FactoredJacobian(stop - start, (), direct, call.primals, each), call

    def _each(
        self, start: int, stop: int, random_state: RandomState, numbers: Sequence[int]
    ) -> tuple[EachSample, FlatCall]:
        calls = [partial(self.call_of_sample, number) for number in range(start, stop)]
        return EachSample.of(calls, numbers, random_state, self.samples.randomness)

    @cached_property
    def learned_as_a_whole(self) -> LearnedUses:
        """What evaluations of the batch as a whole have shown."""
        return LearnedUses.of(self.kind.among("as a whole"))

    def _is_final(self, error: Exception) -> bool:
        """Is it an error that no other way avoids, such as one in words of the public function?"""
        if isinstance(error, Stale | UnseenWrite):
            return True
        return isinstance(error, ValueError | TypeError) and str(error).startswith(f"{self.api}: ")

    def call_of_sample(self, number: int) -> FlatCall:
        """The call of one sample; of zeros, if there is none."""
        return self.call_of(one_sample(self.samples.leaves, self.samples.dims, number))

    def random_state(self) -> RandomState:
        """The state of the generators now."""
        return RandomState(self.samples.leaves)

    def check_randomness(self, error: Exception) -> None:
        """Say in words of the door that a module drew random numbers, if that was the error.

        Raises:
            NotImplementedError: if it was.
        """
        if self.samples.randomness == "error" and "randomness" in str(error):
            raise NotImplementedError(
                f"{self.api}: per_sample must know how samples draw random numbers, got a module "
                "that draws and randomness='error'. Pass randomness='same' or 'different'."
            ) from error


def _name(way: Way) -> str:
    return way.__name__.strip("_").replace("_", " ")
