"""A batch of a kind that was evaluated before, and of which nothing is left to learn."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from jacfunc._calls import BARE, OneTensor
from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian
from jacfunc._faults import NestedWatch
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._measuring import InTurn
from jacfunc._samples import SampledCall
from jacfunc._settled.alone import are_alone
from jacfunc._settled.following import Reads
from jacfunc._settled.repeated import RepeatedEvaluation, knows
from jacfunc._settled.sweeps import MOST_WORKS, NOTHING, Beside, Work
from jacfunc._settled.works import KnownWork
from jacfunc._torch import MathAttention, RandomState, recording, run_as_written
from jacfunc._traces import FEWEST_CALLS, Sources
from jacfunc._trees import Given, Split
from jacfunc._types import Leaves

PLAIN, ALONE = (False, False), (False, False, 1)
"""Around pullbacks of many samples and of one, which are not differentiated further."""

ResultT = TypeVar("ResultT")
Make: TypeAlias = Callable[[], ResultT | None]


class SettledBatch:
    """A module at tensors with the samples in front, as it was evaluated before.

    It returned one tensor with the samples in front, and ran as a whole. So it is evaluated again,
    with all checks of an evaluation; but what earlier ones have shown is not looked up on the way.

    Args:
        batch: an earlier call of this kind.
        names: of the chosen parameters, if it is differentiated by these.
        output: the tensor that the call returned.
        is_watched: must each evaluation be watched?
        by_layers: are parameters differentiated by factors of layers? Of one sample they need not.
        inputs: numbers of the tensors that it is differentiated by, in order.
        returned: the tree in which the call returned the tensor.
    """

    def __init__(
        self,
        batch: SampledCall,
        names: Sequence[str],
        output: Tensor,
        is_watched: bool,
        by_layers: bool,
        inputs: tuple[int, ...] = (),
        returned: OneTensor = BARE,
    ) -> None:
        self.api, self.kind, self.size = batch.api, batch.kind.kind, batch.size
        self.learned, self.misses, self.graph = batch.learned_as_a_whole, 0, 0
        self.names, self.inputs, self.by_layers = names, inputs, by_layers
        self.is_alone, self.is_watched = batch.size == 1, is_watched
        self.is_batchable, self.splits = True, False
        self.output, self.returned = (output.shape, output.dtype), returned
        self.works = dict[Work, KnownWork]()
        self.tree: Split | None = None  # of the inputs, if they are no lone tensor
        self.has_second = self.is_second = False
        """Is there a second choice, which is not tried yet? Is this one?"""
        self.turns: InTurn[SettledBatch] | None = None  # this and the first choice, once both are

    def result(
        self,
        state: ModuleState,
        given: Given,
        compared: Container[int],
        work: Work,
        beside: Leaves | Beside = (),
        api: str = "",
    ) -> Leaves | None:
        """What ``work`` makes of the batch, evaluated while the module is lent for this call alone.

        None where the call must be taken anew. ``api`` is its door, if not that of the earlier one.

        Args:
            state: the module as it is now, of the version of the earlier call.
            given: tensors of the same kinds.
            compared: signatures of evaluations after which batches were compared.
            beside: the tensors that the work takes beside, or what gives them.
        """
        if (known := self.works.get(work)) and known.whole:
            result = known.at_once(self, state, given, compared, beside)
            if result is not None:
                return result
        make = partial(self.made, state, given, compared, work, beside)
        return self._lent(state, given, make, api)

    def made(
        self,
        state: ModuleState,
        given: Given,
        compared: Container[int],
        work: Work,
        beside: Leaves | Beside,
    ) -> Leaves | None:
        """As :meth:`result`, while the module is lent by the caller, who repeats what was drawn."""
        known = self.works.get(work) or KnownWork(work)
        if not known.calls and len(self.works) < MOST_WORKS:
            self.works[work] = known
        if known.sweep:
            result = known.swept(self, state, given, compared, beside)
            if result is not None or self.is_second:  # which must hold always
                return result
        jacobian = self.evaluated(state, given, compared)
        if jacobian is None or not (beside == () or self.returned is BARE):  # as losses need it
            return None
        tensors = beside(jacobian.outputs) if callable(beside) else beside
        result = work(jacobian, tensors)
        known.calls += 1
        linear: Any = jacobian.linearization
        self.is_batchable, self.splits = linear.is_batchable, linear.splits
        del jacobian, linear  # the graph need not stay while another one is made
        if known.calls == FEWEST_CALLS:
            known.learn(self, state, given, tensors, result)
        return result

    def is_known(self, work: Work) -> bool:
        """Were there so many calls that it is written down, if it can be?"""
        known = self.works.get(work)
        return known is not None and known.calls >= FEWEST_CALLS

    def _lent(
        self, state: ModuleState, given: Given, make: Make[ResultT], api: str = ""
    ) -> ResultT | None:
        """What is made while the module is lent; None if the call must be taken anew."""
        random_state = RandomState((*given.tensors, *state.params.values()))
        try:
            lent = state.lent_for_call(api or self.api, self.names, is_current=True)
            with torch.set_grad_enabled(False), lent:  # at less cost than no_grad()
                return self.tried(make, random_state)
        except BaseException:
            random_state.repeat()
            raise

    def tried(self, make: Make[ResultT], random_state: RandomState) -> ResultT | None:
        """What is made; None if the call must be taken anew, as that fails or draws numbers.

        The random state is that before the evaluation.
        """
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
        self, state: ModuleState, given: Given, compared: Container[int]
    ) -> FactoredJacobian | None:
        """The batch, evaluated once; None if it shows something new.

        Gradients are off, and the module is lent by a caller who looks whether numbers were drawn.

        Args:
            compared: signatures of evaluations after which batches were compared.

        Raises:
            UnseenWrite: if a parameter that is no copy was written into.
        """
        if self.names and state.hooks():
            return None
        try:
            with recording(), MathAttention():
                own = self.repeated(state, given)
                # of one sample nothing can be learned of others
                out = self.run(state, given, own, NOTHING if self.is_plain else own.recorder)
                if out is None:
                    return None
                # by inputs alone one sweep follows at once, with all as the evaluation has left it
                recorder = own.recorder
                is_read = recorder.reads_values or recorder.apart
                as_evaluated = state.as_evaluated() if self.names or is_read else None
                jacobian, self.graph = own.jacobian(out, as_evaluated), recorder.graph
            if jacobian is None or not (self.is_alone or knows(self.learned, jacobian, compared)):
                return None
            is_told = self.is_alone or not is_read or are_alone(self, state, given, out, recorder)
            return jacobian if is_told else None
        except UnseenWrite:
            self.learned.ruled = None  # later evaluations get copies again
            raise

    @property
    def is_plain(self) -> bool:
        """Is one sample differentiated as it is?"""
        return self.is_alone and not self.by_layers

    def params(self, state: ModuleState) -> Leaves:
        """The chosen parameters, if it is differentiated by these."""
        return tuple(state.point.values()) if self.names else ()

    def repeated(
        self,
        state: ModuleState,
        given: Given,
        sources: Sources | None = None,
        reads: Reads | None = None,
    ) -> RepeatedEvaluation:
        how = self.learned, self.by_layers, self.inputs, sources, reads
        own = RepeatedEvaluation(self.params(state), given.tensors, *how)
        own.is_batchable, own.splits = self.is_batchable, self.splits
        # of many samples the graph must be that after which batches were compared, if it is swept
        own.recorder.pulls_many = sources is None and (self.is_batchable or not self.is_alone)
        own.recorder.samples = 0 if self.is_alone or self.learned.mixes else self.size
        return own

    def run(
        self,
        state: ModuleState,
        given: Given,
        own: RepeatedEvaluation,
        recorder: AbstractContextManager[object],
    ) -> Tensor | None:
        """What the module returns; None if it is not like what it has returned before."""
        chosen, watch = dict(zip(self.names, own.handles, strict=True)), None
        if self.is_watched and own.is_watched:
            watch = NestedWatch(own.pull(ALONE if self.is_plain else PLAIN), primals=own.primals)
        with watch or NOTHING, state.lent_for_evaluation(chosen), recorder:
            if state.buffers:
                own.recorder.begin(state.module, state.buffers.values())
            called = state.module if given.merge is None else given.called(state.module)
            output = run_as_written(called, *own.tensors)
        if watch is not None:
            own.is_watched = watch.stays_watched
            watch.check_copies((*self.params(state), *[given.tensors[n] for n in self.inputs]))
        out = output if self.returned is BARE else self.returned.tensor_in(output)
        if type(out) is not Tensor or (out.shape, out.dtype) != self.output:
            return None
        return out if out.requires_grad else None
