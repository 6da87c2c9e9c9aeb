"""Curvature in the outputs that are asked for, where these are not all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jacfunc._assembly import shared_units
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._curvature.products import BatchProducts
from jacfunc._errors import is_out_of_memory
from jacfunc._lending import Captured
from jacfunc._log import note
from jacfunc._losses import DenseColumns, Drawn, Predictive
from jacfunc._modules import ModuleAtBatch
from jacfunc._outputs import ChosenCall
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves, Tree


@dataclass(frozen=True)
class LossOfChosen(Loss):
    """A loss as a function of the outputs that are asked for, while all others are constants.

    ``H`` is that in all outputs, of which the rows and columns of these are taken.

    Args:
        every: the loss as a function of all outputs.
        call: picks outputs.
    """

    every: Loss = field(kw_only=True)
    call: ChosenCall = field(kw_only=True)

    @property
    def precise(self) -> Loss:
        leaves = tuple(leaf.double() for leaf in self.outputs.leaves)
        outputs = replace(self.outputs, leaves=leaves)
        return replace(self, every=self.every.precise, outputs=outputs)

    def times_batch(self, tangents: Leaves) -> Leaves:
        def of_one(rows: Tensor) -> Tensor:
            spread = self.call.spread(rows, self.every.outputs.leaves)
            return self.call.rows_of(self.every.times_batch(tuple([u[None] for u in spread])), 2)

        # one after the other: each takes as much as all outputs
        return (torch.cat([of_one(rows) for rows in tangents[0]]),)

    def _known(self) -> tuple[Tensor, float | None] | None:
        return None  # formulas are of all outputs


@dataclass(frozen=True)
class Unweighted:
    """``H = 1``: every output counts by half its square."""

    outputs: BatchOutputs

    @property
    def roots(self) -> Leaves:
        """Unit cotangents, ``[R, B, R]``."""
        return shared_units(self.outputs.leaves)

    def times_batch(self, tangents: Leaves) -> Leaves:
        """The tangents themselves."""
        return tangents


def _every(call: ChosenCall, outputs: BatchOutputs) -> BatchOutputs:
    """All outputs, of which some are asked for."""
    leaves, extras = call.all_and_others(outputs.extras)
    call.check_once(leaves)
    return replace(outputs, leaves=leaves, extras=extras, call=call.of_every_output())


def loss_of(
    api: str, func: LossFunction, targets: Tree, captured: Captured | None, outputs: BatchOutputs
) -> Loss:
    """A loss as a function of the outputs, or of those that are asked for."""
    call = outputs.call
    if not isinstance(call, ChosenCall):
        return Loss(api, func, targets, outputs, captured)
    every = Loss(api, func, targets, _every(call, outputs), captured)
    return LossOfChosen(api, func, targets, outputs, captured, every=every, call=call)


def outputs_of(at_batch: ModuleAtBatch) -> BatchOutputs:
    """The outputs of the batch as a whole, of which no graph is kept.

    That takes no more than the outputs, as factors of all samples do. They are taken where
    the batch does not fit as a whole, or only samples can be evaluated.
    """
    if at_batch.budget.is_open and at_batch.chunk_size is None:
        try:
            return BatchProducts(at_batch).outputs
        except Exception as error:  # of the user's module
            if is_out_of_memory(error):
                raise
            note("the outputs are those of the samples one by one: %s", error)
    return at_batch.outputs


def drawn_of(
    api: str,
    predictive: Predictive,
    outputs: BatchOutputs,
    draws: int,
    generator: torch.Generator | None,
) -> Callable[[BatchOutputs], Drawn]:
    """Gradients at drawn targets in the outputs, or in those that are asked for."""
    call = outputs.call
    every = _every(call, outputs) if isinstance(call, ChosenCall) else outputs
    drawn = predictive.drawn(api, every.tree(every.leaves), every.leaves, draws, generator)
    if not isinstance(call, ChosenCall):
        return lambda outputs: drawn.at(outputs.leaves)
    chosen = Drawn((DenseColumns(call.rows_of(drawn.at(every.leaves).roots, 2)),))
    return lambda _: chosen
