"""Evaluations of a module at a batch of a kind that was evaluated before."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._errors import UnseenWrite
from jacfunc._factored import FactoredJacobian, LearnedUses
from jacfunc._faults import NestedWatch
from jacfunc._layouts import OperationRecorder
from jacfunc._lending import ModuleState
from jacfunc._rounding import are_near
from jacfunc._samples import ALONE_ROUNDING
from jacfunc._settled.repeated import RepeatedEvaluation, Sources
from jacfunc._torch import MathAttention, recording, run_as_written
from jacfunc._types import Leaves

Evaluated: TypeAlias = tuple[RepeatedEvaluation, Sources, Tensor]
"""An evaluation of which sources are kept, and what the module returned."""

Shown: TypeAlias = FactoredJacobian | OperationRecorder
"""What tells which operations an evaluation called."""

PLAIN, ALONE = (False, False), (False, False, 1)
"""Around pullbacks of many samples and of one, which are not differentiated further."""


@dataclass(eq=False)
class Evaluator:
    """Evaluates a module at a tensor with the samples in front, with all checks of an evaluation.

    Gradients are off, and the module is lent for the call. Whoever lends it sees to it that
    nothing was drawn.

    Args:
        names: of the chosen parameters, if it is differentiated by these.
        by_inputs: is it differentiated by the tensor?
        by_layers: are parameters differentiated by factors of layers? Else as they are, which one
            sample alone allows.
        is_alone: is there one sample?
        is_watched: must each evaluation be watched?
        learned: what earlier evaluations have shown.
        output: shape and dtype of what the module returns.
    """

    names: Sequence[str]
    by_inputs: bool
    by_layers: bool
    is_alone: bool
    is_watched: bool
    learned: LearnedUses
    output: tuple[torch.Size, torch.dtype]

    def jacobian(
        self, state: ModuleState, x: Tensor, compared: Container[int]
    ) -> FactoredJacobian | None:
        """The batch, evaluated once; None if it shows something new.

        Args:
            compared: signatures of evaluations after which batches were compared.

        Raises:
            UnseenWrite: if a parameter that is no copy was written into.
        """
        try:
            return self._jacobian(state, x, compared)
        except UnseenWrite:
            self.learned.ruled = None  # later evaluations get copies again
            raise

    def _jacobian(
        self, state: ModuleState, x: Tensor, compared: Container[int]
    ) -> FactoredJacobian | None:
        if self.names and state.hooks():
            return None
        with recording(), MathAttention():
            own = self._repeated(state, x)
            # of one sample nothing can be learned of others
            out = self._run(state, x, own, nullcontext() if self.is_plain else own.recorder)
            if out is None:
                return None
            # by inputs alone one sweep follows at once, with all as the evaluation has left it
            is_again = self.names or own.recorder.reads_values
            jacobian = own.jacobian(out, state.as_evaluated() if is_again else None)
        if jacobian is None or not (self.is_alone or self.is_known(jacobian, compared)):
            return None
        if jacobian.reads_values and not self._are_alone(state, x, out):
            return None
        return jacobian

    def with_sources(self, state: ModuleState, x: Tensor, finds_uses: bool) -> Evaluated | None:
        """An evaluation of which all is kept that a sweep may read; None if it returns otherwise.

        Args:
            finds_uses: is a Jacobian made of it?

        Raises:
            UnseenWrite: if a parameter that is no copy was written into.
        """
        if self.names and state.hooks():
            return None
        sources = Sources()
        with recording(), MathAttention():
            own = self._repeated(state, x, sources, finds_uses)
            with sources.saving():
                out = self._run(state, x, own, own.recorder)
        own.check_unwritten()
        return None if out is None else (own, sources, out)

    @property
    def is_plain(self) -> bool:
        """Is one sample differentiated as it is?"""
        return self.is_alone and not self.by_layers

    def params(self, state: ModuleState) -> Leaves:
        """The chosen parameters, if it is differentiated by these."""
        return tuple(state.point.values()) if self.names else ()

    def is_known(self, shown: Shown, compared: Container[int]) -> bool:
        """Does what was learned of many samples hold for an evaluation with these operations?"""
        learned, signature = self.learned, shown.signature
        if shown.moves_samples or learned.moves_samples or learned.others:
            return False
        if learned.mixes and not shown.reads_values:
            return False
        return signature in learned.signatures and signature in compared

    def _repeated(
        self,
        state: ModuleState,
        x: Tensor,
        sources: Sources | None = None,
        finds_uses: bool = True,
    ) -> RepeatedEvaluation:
        how = self.learned, self.by_layers, self.by_inputs, sources, finds_uses
        return RepeatedEvaluation(self.params(state), x, *how)

    def _run(
        self,
        state: ModuleState,
        x: Tensor,
        own: RepeatedEvaluation,
        recorder: AbstractContextManager[object],
    ) -> Tensor | None:
        """What the module returns; None if it is not like what it has returned before."""
        chosen, watch = dict(zip(self.names, own.handles, strict=True)), None
        if self.is_watched:
            around = ALONE if self.is_plain else PLAIN
            watch = NestedWatch(own.pull(around), primals=own.primals)
        with watch or nullcontext(), state.lent_for_evaluation(chosen), recorder:
            out = run_as_written(state.module, own.x)
        if watch is not None:
            watch.check_copies((*self.params(state), x) if self.by_inputs else self.params(state))
        is_like = type(out) is Tensor and (out.shape, out.dtype) == self.output
        return out if is_like and out.requires_grad else None

    def _are_alone(self, state: ModuleState, x: Tensor, out: Tensor) -> bool:
        """Are outputs those of each sample alone, whose numbers may lead another way?"""
        rows, chosen = [], dict(zip(self.names, self.params(state), strict=True))
        for number in range(len(x)):
            with state.lent_for_evaluation({n: p.detach().clone() for n, p in chosen.items()}):
                rows.append(run_as_written(state.module, x[number : number + 1].clone()))
        if any(type(row) is not Tensor or row.shape[1:] != out.shape[1:] for row in rows):
            return False
        alone = torch.cat(rows)
        is_like = (alone.shape, alone.dtype) == self.output
        return is_like and are_near(out.detach(), alone, ALONE_ROUNDING, lead=1)
