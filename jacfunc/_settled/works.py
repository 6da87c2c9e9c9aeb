"""Works that are done again and again on evaluations of one kind, and how they are written down."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Self

from jacfunc._errors import Nameless
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._rounding import agree
from jacfunc._settled.repeated import knows, knows_signature
from jacfunc._settled.sweeps import Beside, Evaluator, Sweep, Work, evaluated_with_sources, swept
from jacfunc._surroundings import LayerCode
from jacfunc._torch import recording
from jacfunc._traces import MOST_BYTES, MOST_MISSES, WrittenWork
from jacfunc._trees import Given
from jacfunc._types import Leaves


class Whole:
    """A work at evaluations of one kind, written down from the parameters and inputs on.

    Nobody of the user's is told when a module of torch's own layers is called, and it does the same
    each time. So later calls need not call it, as long as these layers run the same code, nobody
    has set a hook, and tensors and settings are of the same kinds.

    Args:
        state: the module, lent for the call; it is not kept alive.
        beside: the tensors that the work takes beside.

    Raises:
        Nameless: if other code may run in the module, or if it can't be written down.
    """

    signature = 0
    """That of such evaluations."""

    def __init__(
        self, settled: Evaluator, state: ModuleState, given: Given, beside: Leaves, work: Work
    ) -> None:
        self._code = LayerCode(state.origin or state)
        self._like: Callable[[Leaves], Leaves] = tuple

        def made() -> Leaves:
            evaluated = evaluated_with_sources(settled, state, given)
            if evaluated is None:
                raise Nameless("the module returns something else")
            result, recorder = swept(evaluated, beside, work), evaluated[0].recorder
            if recorder.moves_samples or recorder.reads_values or recorder.apart:
                raise Nameless("numbers tell what is done")
            if settled.is_watched and evaluated[0].is_watched:
                raise Nameless("each evaluation is watched")
            recorder.graph = settled.graph  # its own may be of other kernels
            self.signature = recorder.signature
            self._like = getattr(result, "like", tuple)
            return result

        self._work = WrittenWork(made, _sources(state, given, beside))

    @classmethod
    def written(
        cls,
        settled: Evaluator,
        state: ModuleState,
        given: Given,
        beside: Leaves,
        work: Work,
        expected: Leaves,
    ) -> Self | None:
        """A work, written down; None if it can't be, or if its first tensors are unexpected."""
        try:
            whole = cls(settled, state, given, beside, work)
        except Exception as error:  # the module is called as before
            note("a settled kind of call is not written down with its evaluation: %s", error)
            return None
        result = whole.result(state, given, beside)
        is_right = result is not None and agree(result[: len(expected)], expected)
        return whole if is_right else None

    def result(self, state: ModuleState, given: Given, beside: Leaves) -> Leaves | None:
        """The result of other numbers; None where it does not hold, or fails."""
        # a list may have had other entries when a copy was made
        if not self._code.is_as_then() or (state.is_copy and not state.is_plain):
            return None
        try:
            with recording(False):
                result = self._work.result(_sources(state, given, beside))
        except Exception as error:  # it is told of where the module is called
            note("a module is called again for a result that is written down: %s", error)
            return None
        return None if result is None else self._like(result)


def _sources(state: ModuleState, given: Given, beside: Leaves) -> Leaves:
    """All tensors that an evaluation may read, and what is taken beside it."""
    own = (*state.params.values(), *state.buffers.values())
    if state.is_copy:
        own = (*map(state.copies.__getitem__, map(id, own)),)
    return (*own, *given.tensors, *beside)


@dataclass(eq=False)
class KnownWork:
    """A work that is done again and again, and the sweep that does it, once that is known.

    Args:
        work: makes a result.
        calls: so many results were made without a sweep.
        misses: so often in a row the sweep did not hold.
    """

    work: Work
    calls: int = 0
    misses: int = 0
    sweep: Sweep | None = None
    whole: Whole | None = None

    def at_once(
        self,
        settled: Evaluator,
        state: ModuleState,
        given: Given,
        compared: Container[int],
        beside: Leaves | Beside,
    ) -> Leaves | None:
        """The result without an evaluation; None where one is needed."""
        whole, learned = self.whole, settled.learned
        if whole is None or callable(beside) or (settled.names and state.hooks()):
            return None
        if not (settled.is_alone or knows_signature(learned, whole.signature, compared)):
            return None
        return whole.result(state, given, beside)

    def swept(
        self,
        settled: Evaluator,
        state: ModuleState,
        given: Given,
        compared: Container[int],
        beside: Leaves | Beside,
    ) -> Leaves | None:
        """The result of one more evaluation by the sweep; None where that does not hold."""
        assert self.sweep is not None
        result, evaluated = None, evaluated_with_sources(settled, state, given, self.sweep.reads)
        if evaluated is not None:
            own, sources, out = evaluated
            is_like = self.sweep.holds_for(evaluated)
            if is_like and (settled.is_alone or knows(settled.learned, own.recorder, compared)):
                others = beside((out.detach(),)) if callable(beside) else beside
                result = self.sweep.replayed(sources, out, others)
        self.misses = 0 if result is not None else self.misses + 1
        if self.misses >= MOST_MISSES:
            self.sweep = None
        return result

    def learn(
        self, settled: Evaluator, state: ModuleState, given: Given, beside: Leaves, result: Leaves
    ) -> None:
        """Write down how this result is made, if that can be."""
        if sum(x.nbytes for x in result) > MOST_BYTES:
            return
        try:
            self._write_sweep(settled, state, given, beside, result)
        except Exception as error:  # it goes on as before
            note("a settled kind of call is not written down: %s", error)
        self.whole = Whole.written(settled, state, given, beside, self.work, result)

    def _write_sweep(
        self, settled: Evaluator, state: ModuleState, given: Given, beside: Leaves, result: Leaves
    ) -> None:
        """Write down what is done after an evaluation."""
        evaluated = evaluated_with_sources(settled, state, given)
        if evaluated is None:
            return
        sweep = Sweep(evaluated, beside, self.work, settled.graph)
        del evaluated  # before there is another one
        evaluated = evaluated_with_sources(settled, state, given, sweep.reads)
        if evaluated is not None and sweep.fits(evaluated, beside, result):
            self.sweep = sweep
