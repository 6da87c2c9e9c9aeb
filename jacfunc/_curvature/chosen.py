"""Curvature in the outputs that are asked for, where these are not all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jacfunc._assembly import shared_units
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._lending import Captured
from jacfunc._losses import DenseColumns, Drawn, Predictive
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

    def times(self, tangents: Leaves) -> Leaves:
        (rows,) = tangents
        spread = self.call.spread(rows, self.every.outputs.leaves)
        return (self.call.rows_of(self.every.times(spread), 1),)

    @property
    def precise(self) -> Loss:
        leaves = tuple(leaf.double() for leaf in self.outputs.leaves)
        outputs = replace(self.outputs, leaves=leaves)
        return replace(self, every=self.every.precise, outputs=outputs)

    def times_batch(self, tangents: Leaves) -> Leaves:
        # one after the other: each takes as much as all outputs
        every = [self.times(tuple(u[k] for u in tangents))[0] for k in range(len(tangents[0]))]
        return (torch.stack(every),)

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

    def times(self, tangents: Leaves) -> Leaves:
        """The tangents themselves."""
        return tangents

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
