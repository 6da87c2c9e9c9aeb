"""A batch of a kind that was evaluated before, and of which nothing is left to learn."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian, LearnedUses
from jacfunc._faults import is_unwatched
from jacfunc._layouts import OUT, Layout
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._samples import SampledCall
from jacfunc._settled.evaluating import ALONE, PLAIN, Evaluator
from jacfunc._settled.repeated import blocks_of, matrix_of
from jacfunc._settled.sweeps import FEWEST_CALLS, KnownWork, SeedsOf, Work
from jacfunc._torch import RandomState
from jacfunc._types import Leaves, Tree

MOST_WORKS = 4
"""Works that are known of a kind of call."""

ResultT = TypeVar("ResultT")


class SettledBatch:
    """A module at a tensor with the samples in front, as it was evaluated before.

    It returned one tensor with the samples in front, and ran as a whole. So it is evaluated again,
    with all checks of an evaluation; but what earlier ones have shown is not looked up on the way.
    :meth:`result` is the way in, for whatever is made of the evaluated batch.

    Args:
        batch: an earlier call of this kind.
        names: of the chosen parameters, if it is differentiated by these.
        output: what that call returned.
        is_watched: must each evaluation be watched?
        by_layers: are parameters differentiated by factors of layers? Else as they are, which one
            sample alone allows.
    """

    def __init__(
        self,
        batch: SampledCall,
        names: Sequence[str],
        output: Tensor,
        is_watched: bool,
        by_layers: bool,
    ) -> None:
        self.api, self.kind, self.size = batch.api, batch.kind.kind, batch.size
        self.learned, self.misses = batch.learned_as_a_whole, 0
        by_inputs, is_alone = batch.differentiates[1], batch.size == 1
        how = names, by_inputs, by_layers, is_alone, is_watched
        self.evaluator = Evaluator(*how, self.learned, (output.shape, output.dtype))
        self._works = dict[Work, KnownWork]()

    @classmethod
    def of(
        cls,
        batch: SampledCall,
        state: ModuleState,
        call: object,
        output: Tree,
        by_layers: bool = True,
    ) -> Self | None:
        """What a call has settled; None if it has not settled all but the numbers.

        Args:
            call: that was made, which tells whether calls of its kind must be watched.
            output: the tree that it returned.
        """
        names = tuple(state.point) if batch.differentiates[0] else ()
        by_layers = by_layers and bool(names)
        is_alone, learned = batch.size == 1, batch.learned_as_a_whole
        is_refused = "as a whole" in LearnedUses.of(batch.kind).refused
        if type(output) is not Tensor or not batch.size or (is_refused and not is_alone):
            return None
        if not (is_alone or is_in_front(learned, bool(names))):
            return None
        if by_layers and (is_refused or learned.ruled is None or learned.others):
            return None
        around = ALONE if is_alone and not by_layers else PLAIN
        return cls(batch, names, output, not is_unwatched(call, around), by_layers)

    def keep_works(self, before: SettledBatch | None) -> None:
        """Keep what an earlier call of the same kind has written down."""
        if before is not None:
            self._works = before._works

    def blocks(self, state: ModuleState, x: Tensor, compared: Container[int]) -> Leaves | None:
        """Blocks ``[B, *out, *primal]``; None where the call must be taken anew."""
        return self.result(state, x, compared, blocks_of)

    def matrix(self, state: ModuleState, x: Tensor, compared: Container[int]) -> Tensor | None:
        """The matrix ``[B, M, N]``; None where the call must be taken anew."""
        result = self.result(state, x, compared, matrix_of)
        return None if result is None else result[0]

    def result(
        self,
        state: ModuleState,
        x: Tensor,
        compared: Container[int],
        work: Work,
        seeds_of: SeedsOf | None = None,
        api: str = "",
    ) -> Leaves | None:
        """What ``work`` makes of the batch, evaluated while the module is lent for this call alone.

        None where the call must be taken anew. ``api`` is its door, if not that of the earlier one.

        Args:
            state: the module as it is now, of the version of the earlier call.
            x: a tensor of the same kind.
            compared: signatures of evaluations after which batches were compared.
            seeds_of: makes what the work takes beside, if anything.

        Raises:
            RuntimeError: if the module wrote into a parameter that was no copy.
        """
        known = self._works.get(work) or KnownWork(work)
        if len(self._works) < MOST_WORKS:
            self._works[work] = known

        def made() -> Leaves | None:
            if known.sweep is not None:
                result = known.swept(self.evaluator, state, x, compared, seeds_of)
                if result is not None:
                    return result
            jacobian = self.evaluator.jacobian(state, x, compared)
            if jacobian is None:
                return None
            seeds = seeds_of(jacobian.outputs) if seeds_of else ()
            result = work(jacobian, seeds)
            known.calls += 1
            if known.calls == FEWEST_CALLS:
                known.learn(self.evaluator, state, x, seeds, result)
            return result

        return self._lent(state, x, made, api)

    def _lent(
        self, state: ModuleState, x: Tensor, make: Callable[[], ResultT | None], api: str = ""
    ) -> ResultT | None:
        """What is made while the module is lent; None if the call must be taken anew."""
        random_state = RandomState((x, *state.params.values()))
        try:
            names = self.evaluator.names
            lent = state.lent_for_call(api or self.api, names, is_current=True)
            with torch.no_grad(), lent:
                return self._tried(make, random_state)
        except BaseException:
            random_state.repeat()
            raise

    def again(
        self, state: ModuleState, x: Tensor, compared: Container[int], random_state: RandomState
    ) -> FactoredJacobian | None:
        """The batch evaluated by who lends the module; None where the call must be taken anew.

        Args:
            random_state: as the evaluation finds it; nothing may be drawn.
        """
        return self._tried(lambda: self.evaluator.jacobian(state, x, compared), random_state)

    def _tried(
        self, make: Callable[[], ResultT | None], random_state: RandomState
    ) -> ResultT | None:
        """What is made; None if that fails, or draws random numbers."""
        result = None
        try:
            result = make()
        except UnseenWrite:
            raise
        except Exception as error:  # as it is told of when it is taken anew
            note("a kind of call that was settled is taken anew: %s", error)
        if result is None or random_state.has_changed():
            random_state.repeat()
            self.misses += 1
            return None
        self.misses = 0
        return result


def is_in_front(learned: LearnedUses, has_layers: bool) -> bool:
    """Have evaluations shown that the output, and without layers all, has the samples in front?"""
    sites = learned.sites or {}
    every = [sites.get((~0, OUT))] if has_layers else [*sites.values()]
    return bool(every) and all(site is not None and site.layout == Layout(0) for site in every)
