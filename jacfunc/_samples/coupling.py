"""An exact comparison of two batches, which tells whether samples depend on each other.

Samples outside a random half are replaced by samples from inside, random numbers are drawn again,
and one random cotangent, zero outside the half, is pulled back through both batches. Where samples
are independent, both compute the half by the same operations on the same numbers, and zeros are
added to the rest: the outputs of the half, the gradients in its inputs and those in all parameters
agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._linear_map import CHANGING, detached
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._memory import give_back
from jacfunc._samples.comparing import BatchGraph, Coupling, OperationsCalled, Subject
from jacfunc._samples.halves import Half, Quantity, halves, has_batch
from jacfunc._torch import RandomState, uncompiled
from jacfunc._types import Leaves

COARSE = 0.1
"""Relative difference between a sample alone and in its batch that is no rounding."""

LARGE_RESULT = 2**20
"""If all samples' Jacobians together have so many entries, the memory that the first comparison of
a kind of call took is given back to the system."""

BY_INDEX = "embedding_bag", "index", "gather", "scatter", "sort"
"""Parts of the names of operations whose sums may add their terms in another order."""

BY_GROUPS = "grouped_mm", "segment_reduce"
"""Operations on groups of rows, of sizes that numbers decide: another size is rounded otherwise."""


def coupling(subject: Subject, number: int, thorough: bool, at_once: int | None) -> Coupling:
    """Whether samples of a module depend on each other.

    Args:
        number: the number of this check; with another one, other halves are compared.
        thorough: compare several halves, and one sample alone.
        at_once: samples of a batch; a random few if there are more. None compares all, in groups
            whose graph is of modest size, and is kept for all comparisons of the group.
    """
    generator = torch.Generator().manual_seed(number)
    random_state = RandomState(subject.samples.leaves)
    size = subject.size
    count = min(size, at_once or subject.fitting(random_state))
    while True:
        order = torch.randperm(size, generator=generator, device="cpu")
        groups = [order[:count]] if at_once else order.tensor_split(-(-size // count))
        batches = (subject.of(group.sort()[0]) for group in groups)
        compared = (_Comparison(x, random_state, number, at_once is None) for x in batches)
        try:
            result = _until_shown(x.result(generator, thorough) for x in compared)
            if result.was_evaluated or count == size:
                entries = result.rows * subject.width * size
                if number == 1 and entries >= LARGE_RESULT:  # later ones take the same pages again
                    give_back()  # or what was taken would lie beside the result
                return replace(result, entries=entries)
            count = size  # a module may take batches of one size
        except Exception as error:
            if not is_out_of_memory(error) or count < 4:
                raise
            note("whether samples depend is seen from fewer of them: %s", error)
            count //= 2
        finally:
            random_state.repeat()


def _until_shown(results: Iterable[Coupling]) -> Coupling:
    """The first result that shows a change, or a batch that does not run; else the last one."""
    was_shown, result = False, Coupling()
    for result in results:
        was_shown |= result.was_shown
        if result.what is not None or not result.was_evaluated:
            break
    return replace(result, was_shown=was_shown)


@dataclass(frozen=True)
class _Comparison:
    """A batch, compared with others in which some samples are replaced."""

    subject: Subject
    random_state: RandomState
    number: int
    keeps_graph: bool
    """Is the batch evaluated once for all comparisons, or each time, so that one graph is there?"""

    def result(self, generator: torch.Generator, thorough: bool) -> Coupling:
        try:
            outputs = self._outputs
        except Exception as error:  # a module may take one sample alone
            if is_out_of_memory(error):
                raise
            note("the batch could not be evaluated as a whole, to see if samples depend: %s", error)
            return Coupling(was_evaluated=False)
        size = self.subject.size
        numel = sum(out.numel() for out in outputs)
        what = self._what_changes(generator, thorough) if size > 1 else None
        was_shown = size == 1 or self.subject.has_different_samples
        return Coupling(what, numel // size, was_shown=was_shown)

    def _what_changes(self, generator: torch.Generator, thorough: bool) -> str | None:
        """What changes with the other samples, in words; None if nothing does."""
        every = halves(self.subject.size, generator)
        for half in every if thorough else every[:1]:
            if what := self._changed(half) or self._unbatched(half, generator):
                if self._is_random and any(map(self._draws_otherwise, every)):
                    note("how much is drawn depends on the data: whether samples depend was unseen")
                    return None
                return f"{what} that change with the other samples"
        if thorough and not self._is_random:
            number = torch.randint(self.subject.size, (), generator=generator, device="cpu")
            return self._alone(int(number))
        return None

    def _unbatched(self, half: Half, generator: torch.Generator) -> str | None:
        """Outputs without the batch in front that change with samples inside and outside a half.

        Modules that are made for one sample alone may take the first of a batch: such an output
        changes with one half only. Where one sample gives an output of more or fewer dimensions,
        the module takes a batch for something else, and nothing is said of samples.
        """
        size = self.subject.size
        if all(has_batch(out, size) or not out.dim() for out in self._outputs):
            return None
        half = replace(half, is_of_unbatched=True)
        if not (self._changed(half) and self._changed(half.other(generator))):
            return None
        alone = self._outputs_of(0) or self._outputs
        shapes = [
            str(tuple(out.shape))
            for out, one in zip(self._outputs, alone, strict=True)
            if half.compares(out) and out.dim() == one.dim()
        ]
        if not shapes:
            return None
        return f"outputs of shape {', '.join(shapes)}, without the batch of {size} in front,"

    @kept_property
    def _outputs(self) -> Leaves:
        return detached(self._graph().outputs)

    @kept_property
    def _kept(self) -> BatchGraph:
        return self.subject.evaluate(self.random_state)

    def _graph(self) -> BatchGraph:
        """The batch on its graph."""
        return self._kept if self.keeps_graph else self.subject.evaluate(self.random_state)

    @kept_property
    def _is_random(self) -> bool:
        self.subject.evaluate(self.random_state)
        return self.random_state.has_changed()

    def _draws_otherwise(self, half: Half) -> bool:
        """Are more or fewer random numbers drawn with other samples?"""
        self.subject.evaluate(self.random_state)
        after = RandomState(self.subject.samples.leaves)
        self.subject.of(half.sources).evaluate(self.random_state)
        return after.has_changed()

    def _changed(self, half: Half) -> str | None:
        """What of a half changes when the samples outside are replaced, in words."""
        cotangents: Leaves | None = half.cotangents(self._outputs, self.number)
        try:
            own = self._graph().quantities(half, cotangents)
        except Exception as error:  # torch has no type for what it can't differentiate
            if is_out_of_memory(error):
                raise
            note("whether samples depend was seen from values alone: %s", error)
            cotangents = None
            own = self._graph().quantities(half, None)
        other = self.subject.of(half.sources)
        graph = other.evaluate(self.random_state)
        if any(x.shape != y.shape for x, y in zip(self._outputs, graph.outputs, strict=True)):
            return "shapes of outputs"
        others = graph.quantities(half, cotangents)
        if all(one.agrees(two) for one, two in zip(own, others, strict=True)):
            return None
        again = self.subject.evaluate(self.random_state).quantities(half, cotangents)
        if not all(one.is_roughly(same) for one, same in zip(own, again, strict=True)):
            raise Refused(CHANGING)
        for one, two, same in zip(own, others, again, strict=True):
            if not (one.agrees(two) or self._are_rounded(one, two, same, other)):
                return one.what
        return None

    def _are_rounded(self, one: Quantity, two: Quantity, again: Quantity, other: Subject) -> bool:
        """May a difference of the last bits be rounding?

        It may where two evaluations of one batch differ, as on accelerators; where the other batch
        meets other operations or shapes, or other groups, as mixtures of experts do; and in sums
        over samples whose order is that of indices.
        """
        if not one.agrees_roughly(two):
            return False
        if not one.is_same_as(again):
            return True
        names = BY_GROUPS + BY_INDEX if one.is_sum else BY_GROUPS
        is_named = any(name in str(func) for func, _ in self._called for name in names)
        return is_named or self._called != self._operations(other)

    @kept_property
    def _called(self) -> list[tuple[Any, Any]]:
        return self._operations(self.subject)

    def _operations(self, subject: Subject) -> list[tuple[Any, Any]]:
        recorder = OperationsCalled()
        with uncompiled(), recorder:
            subject.evaluate(self.random_state)
        return recorder.operations

    def _outputs_of(self, number: int) -> Leaves | None:
        """The outputs of a sample alone; None if it can't be evaluated."""
        one = self.subject.of(torch.tensor([number], device="cpu"))
        try:
            return one.evaluate(self.random_state).outputs
        except Exception as error:
            if is_out_of_memory(error):
                raise
            note("a sample could not be evaluated alone, to see if samples depend: %s", error)
            return None

    def _alone(self, number: int) -> str | None:
        """What of a sample is different when it is evaluated alone, in words."""
        outputs = self._outputs_of(number)
        if outputs is None:
            return None
        for out, alone in zip(self._outputs, outputs, strict=True):
            if not has_batch(out, self.subject.size):
                continue
            row = out.detach()[number]
            if row.numel() != alone.numel():
                return "shapes of outputs that change with the number of samples"
            one = alone.detach().reshape(row.shape)
            apart, sizes = (row - one).abs(), torch.cat((row.flatten(), row.new_zeros(1))).abs()
            is_off = apart.nan_to_num(0.0, 0.0) > COARSE * sizes.nan_to_num(0.0, 0.0).max()
            if bool((is_off | (row.isnan() != one.isnan())).any()):
                return "outputs that change with the number of samples"
        return None
