"""What weighs the outputs of a batch: a loss, in all of them or in those asked for, or draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._assembly import shared_units
from jacfunc._calls import BARE
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._curvature.products import BatchProducts
from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._factored import FactoredJacobian, add_squares
from jacfunc._lending import Captured
from jacfunc._log import note
from jacfunc._losses import (
    DenseColumns,
    Drawn,
    LossKind,
    Predictive,
    SecondDerivative,
    TorchLoss,
)
from jacfunc._modules import ModuleAtBatch
from jacfunc._outputs import ChosenCall
from jacfunc._rounding import contracting
from jacfunc._settled import pulled, pushed
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


class KnownLoss:
    """A loss of torch at the targets of one call: its kind, and the tensors that it takes.

    Args:
        api: the public function, with whose name error messages begin.
        loss: has a formula for its second derivative.
        captured: what it closes over, if it closes over anything.
    """

    @classmethod
    def of(
        cls, api: str, loss: TorchLoss | None, targets: Any, captured: Captured | None
    ) -> Self | None:
        """From a loss of torch, if it is one; None where nothing is known of it."""
        if loss is None or type(targets) is not Tensor or not loss.has_formula:
            return None
        return cls(api, loss, targets, captured)

    def __init__(
        self, api: str, loss: TorchLoss, targets: Tensor, captured: Captured | None
    ) -> None:
        self._api, self._loss, self._captured, self._is_checked = api, loss, captured, False
        kind, weights = loss.divided
        self.kind: LossKind = kind
        self.tensors: Leaves = targets, *weights

    @property
    def is_convex(self) -> bool:
        """Has its second derivative a root whatever the numbers are? Weights may be negative."""
        targets, *weights = self.tensors
        are_weights = self.kind.function is F.cross_entropy and targets.is_floating_point()
        return not (weights or are_weights)

    def beside(self, outputs: Leaves) -> Leaves:
        """The targets, and the weights.

        Raises:
            ValueError: if tensors that the loss closes over have changed since the call. For
                targets that do not fit, whatever the loss itself raises.
        """
        if self._captured is not None:
            self._captured.check(self._api, "the loss")
        if not self._is_checked:  # a formula would take classes that there are not
            self._loss(outputs[0], self.tensors[0])
            self._is_checked = True
        return self.tensors


@dataclass(frozen=True)
class UnderLoss:
    """Something that is made of a batch under a loss of torch, and of the tensors that this takes.

    The module returned one tensor. Calls settle how it is made, whatever the numbers are.
    """

    loss: LossKind

    def loss_at(self, api: str, outputs: Leaves, beside: Leaves, by_formula: bool = True) -> Loss:
        """The loss at outputs, of targets and weights.

        Raises:
            Refused: if its second derivative must be known ``by_formula``, and is not.
        """
        if by_formula:
            self.second_at(outputs, beside)
        targets, *weights = beside
        loss = self.loss.with_weights(weights)
        return Loss(api, loss, targets, BatchOutputs(outputs, (), BARE))

    def second_at(self, outputs: Leaves, beside: Leaves) -> SecondDerivative:
        """The formula for its second derivative at outputs, of targets and weights that fit.

        Raises:
            Refused: if none is known.
        """
        targets, *weights = beside
        second = self.loss.with_weights(weights).at(outputs[0], targets)
        if second is None:
            raise Refused("the loss may couple samples")
        return second


@dataclass(frozen=True)
class ProductUnder(UnderLoss):
    """``Jᵀ H J v``: beside there are v, and what the loss takes."""

    def __call__(self, jacobian: FactoredJacobian, beside: Leaves) -> Leaves:
        count = len(jacobian.params)
        second = self.second_at(jacobian.outputs, beside[count:])
        (through,) = pushed(jacobian, beside[:count])
        with torch.no_grad():
            weighed = second.times(through)
        return pulled(jacobian, (weighed,))


@dataclass(frozen=True)
class SquaresUnder(UnderLoss):
    """The diagonal of ``Jᵀ H J``."""

    def __call__(self, jacobian: FactoredJacobian, beside: Leaves) -> Leaves:
        loss = self.loss_at("ggn", jacobian.outputs, beside, by_formula=False)
        return squares(jacobian, loss.roots)


def squares(jacobian: FactoredJacobian, cotangents: Leaves) -> Leaves:
    """``Σ_b Σ_r (J_bᵀ c_br)²`` of each parameter, of a module that returned one tensor."""
    names, totals = list(map(str, range(len(jacobian.params)))), dict[str, Tensor]()
    named = zip(names, jacobian.parts_of_cotangents(cotangents), jacobian.params, strict=True)
    with contracting(jacobian.params):
        add_squares(totals, {name: (parts, x) for name, parts, x in named if parts})
    zeros = cotangents[0].new_zeros
    pairs = zip(names, jacobian.params, strict=True)
    return tuple([totals[n] if n in totals else zeros(x.shape, dtype=x.dtype) for n, x in pairs])


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
