"""A batch of a kind that was evaluated before, and of which nothing is left to learn."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Self, TypeVar

import torch
from torch import Tensor

from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian, LearnedUses
from jacfunc._faults import NestedWatch, is_unwatched
from jacfunc._layouts import OUT, Layout
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._memory import keep_heap
from jacfunc._rounding import are_near
from jacfunc._samples.call import ALONE_ROUNDING, SampledCall
from jacfunc._samples.repeated import RepeatedEvaluation, blocks_of, matrix_of
from jacfunc._torch import (
    MathAttention,
    RandomState,
    recording,
    run_as_written,
)
from jacfunc._types import Leaves, Tree

MOST_MISSES = 3
"""After so many calls that had to be taken anew, a kind of call is no more tried so."""

PLAIN, ALONE = (False, False), (False, False, 1)
"""Around pullbacks of many samples and of one, which are not differentiated further."""

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
        self.is_alone = batch.size == 1
        self.names, self.by_inputs = names, batch.differentiates[1]
        self.learned = batch.learned_as_a_whole
        self.output = output.shape, output.dtype
        self.is_watched, self.by_layers = is_watched, by_layers
        self.misses = 0

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

    def blocks(self, state: ModuleState, x: Tensor, compared: Container[int]) -> Leaves | None:
        """Blocks ``[B, *out, *primal]``; None where the call must be taken anew."""
        return self.result(state, x, compared, blocks_of)

    def matrix(self, state: ModuleState, x: Tensor, compared: Container[int]) -> Tensor | None:
        """The matrix ``[B, M, N]``; None where the call must be taken anew."""
        return self.result(state, x, compared, matrix_of)

    def result(
        self,
        state: ModuleState,
        x: Tensor,
        compared: Container[int],
        work: Callable[[FactoredJacobian], ResultT],
        api: str = "",
    ) -> ResultT | None:
        """What ``work`` makes of the batch, evaluated while the module is lent for this call alone.

        None where the call must be taken anew. ``api`` is its door, if not that of the earlier one.

        Args:
            state: the module as it is now, of the version of the earlier call.
            x: a tensor of the same kind.
            compared: signatures of evaluations after which batches were compared.

        Raises:
            RuntimeError: if the module wrote into a parameter that was no copy.
        """

        def made() -> ResultT | None:
            jacobian = self.evaluated(state, x, compared)
            return None if jacobian is None else work(jacobian)

        return self._lent(state, x, made, api)

    def _lent(
        self, state: ModuleState, x: Tensor, make: Callable[[], ResultT | None], api: str = ""
    ) -> ResultT | None:
        """What is made while the module is lent; None if the call must be taken anew."""
        random_state = RandomState((x, *state.params.values()))
        try:
            with torch.no_grad(), state.lent_for_call(api or self.api, self.names, is_current=True):
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
        return self._tried(lambda: self.evaluated(state, x, compared), random_state)

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

    def evaluated(
        self, state: ModuleState, x: Tensor, compared: Container[int]
    ) -> FactoredJacobian | None:
        """The batch, evaluated once; None if it shows something new.

        Gradients are off, and the module is lent for the call. Whoever lends it sees to it that
        nothing was drawn.

        Raises:
            UnseenWrite: if a parameter that is no copy was written into.
        """
        try:
            return self._evaluated(state, x, compared)
        except UnseenWrite:
            self.learned.ruled = None  # later evaluations get copies again
            raise

    def _evaluated(
        self, state: ModuleState, x: Tensor, compared: Container[int]
    ) -> FactoredJacobian | None:
        if self.names and state.hooks():
            return None
        keep_heap()
        params, is_plain = self._params(state), self.is_alone and not self.by_layers
        with recording(), MathAttention():
            own = RepeatedEvaluation(params, x, self.learned, self.by_layers, self.by_inputs)
            around = ALONE if is_plain else PLAIN
            watch = NestedWatch(own.pull(around), primals=own.primals) if self.is_watched else None
            chosen = dict(zip(self.names, own.handles, strict=True))
            # of one sample nothing can be learned of others
            recorder = nullcontext() if is_plain else own.recorder
            with watch or nullcontext(), state.lent_for_evaluation(chosen), recorder:
                out = run_as_written(state.module, own.x)
            if watch is not None:
                watch.check_copies((*params, x) if self.by_inputs else params)
            is_like = type(out) is Tensor and (out.shape, out.dtype) == self.output
            if not (is_like and out.requires_grad):
                return None
            # by inputs alone one sweep follows at once, with all as the evaluation has left it
            is_again = params or own.recorder.reads_values
            jacobian = own.jacobian(out, state.as_evaluated() if is_again else None)
        if jacobian is None or not (self.is_alone or self._is_known(jacobian, compared)):
            return None
        if jacobian.reads_values and not self._are_alone(state, x, out):
            return None
        return jacobian

    def _params(self, state: ModuleState) -> Leaves:
        return tuple(state.point.values()) if self.names else ()

    def _is_known(self, jacobian: FactoredJacobian, compared: Container[int]) -> bool:
        """Does what was learned of many samples hold for an evaluation with these operations?"""
        learned, signature = self.learned, jacobian.signature
        if jacobian.moves_samples or learned.moves_samples or learned.others:
            return False
        if learned.mixes and not jacobian.reads_values:
            return False
        return signature in learned.signatures and signature in compared

    def _are_alone(self, state: ModuleState, x: Tensor, out: Tensor) -> bool:
        """Are outputs those of each sample alone, whose numbers may lead another way?"""
        rows, chosen = [], dict(zip(self.names, self._params(state), strict=True))
        for number in range(len(x)):
            with state.lent_for_evaluation({n: p.detach().clone() for n, p in chosen.items()}):
                rows.append(run_as_written(state.module, x[number : number + 1].clone()))
        if any(type(row) is not Tensor or row.shape[1:] != out.shape[1:] for row in rows):
            return False
        alone = torch.cat(rows)
        is_like = (alone.shape, alone.dtype) == self.output
        return is_like and are_near(out.detach(), alone, ALONE_ROUNDING, lead=1)


def is_in_front(learned: LearnedUses, has_layers: bool) -> bool:
    """Have evaluations shown that the output, and without layers all, has the samples in front?"""
    sites = learned.sites or {}
    every = [sites.get((~0, OUT))] if has_layers else [*sites.values()]
    return bool(every) and all(site is not None and site.layout == Layout(0) for site in every)
