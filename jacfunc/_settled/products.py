"""Products with the Jacobian of a whole batch at one point, as earlier ones have settled them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jacfunc._products import PointProducts
from jacfunc._rounding import agree
from jacfunc._settled.known_products import APART, AtBatch, KnownProducts, Steps, WrittenPoint
from jacfunc._settled.sweeps import Beside, Work
from jacfunc._torch import is_undisturbed
from jacfunc._traces import FEWEST_CALLS
from jacfunc._types import Leaves


class ProductsAgain:
    """Products with J and its transpose at one point, of a kind that others have settled.

    Args:
        at_batch: the point.
        known: what others have settled.
        whole: makes a product all at once, of a vector and of the tensors that come with it, which
            are looked at beside what the module returns; None where one can't tell what is done
            between J and its transpose.
    """

    def __init__(
        self,
        at_batch: AtBatch,
        known: KnownProducts,
        whole: tuple[Work, Leaves, Beside] | None = None,
    ) -> None:
        self._at_batch, self._known, self._ways = at_batch, known, list[Steps]([APART])
        if whole is not None:
            work, self._tensors, self._beside = whole
            self._ways.insert(0, (work,))
        self._point: WrittenPoint | None = None
        self._outputs: Leaves = ()
        """Of an evaluation with a graph, if there was one: all must return the same."""
        self._is_tried = False

    @property
    def output(self) -> Tensor | None:
        """What the module returns; None where products are not written down."""
        point = self._evaluated() if is_undisturbed() else self._point
        return None if point is None else point.output.detach()

    def _evaluated(self) -> WrittenPoint | None:
        """The point, evaluated once, if nobody looks on; None where nothing is written down."""
        known = self._known
        if self._is_tried or known.settled is None:
            return self._point
        for way in self._ways:
            if sweeps := known.sweeps.get(way):
                self._is_tried = True
                point = known.at(self._at_batch, sweeps)
                if point is not None and agree(self._outputs, (point.output,)):
                    self._point = point
                break
        return self._point

    def product(self, tangents: Leaves, weigh: Callable[[Leaves], Leaves]) -> Leaves | None:
        """``Jᵀ weigh(J v)`` of one vector; None where it is not written down.

        Raises:
            ValueError: if tensors have changed that are no copies.
        """
        if not is_undisturbed():
            return None
        originals = self._at_batch.call.state.originals
        if originals is not None:
            originals.check(self._at_batch.call.api)
        if (made := self._first(tangents)) is not None:
            return made
        if (point := self._evaluated()) is None:
            return None
        with torch.set_grad_enabled(False):  # as no_grad, in fewer calls
            if len(point.sweeps) == 1:
                made = point.made(0, (*tangents, *self._beside((point.output.detach(),))))
            elif (made := point.made(0, tangents)) is not None:
                made = point.made(1, tuple([u[0] for u in weigh((made[0][None],))]))
        return made

    def _first(self, tangents: Leaves) -> Leaves | None:
        """The first product at the point, which may need no evaluation; None where one is made."""
        way = self._ways[0]
        if self._is_tried or self._outputs or len(way) > 1:
            return None
        made = self._known.at_once(self._at_batch, way, (*tangents, *self._tensors))
        if made is None:
            return None
        *products, output = made
        self._outputs = (output,)
        self._beside(self._outputs)  # which raises where targets do not fit
        return tuple(products)

    def learn(
        self, tangents: Leaves, result: Leaves, products: PointProducts, outputs: Leaves
    ) -> None:
        """Count a product of one vector, taken otherwise; after some, write down how it is taken.

        Args:
            result: the product.
            products: those with J and its transpose at the point.
            outputs: of the evaluation that they are taken from.
        """
        self._outputs = outputs
        known, are_behind = self._known, self._at_batch.call.output_dims.dims
        if are_behind or not (known.are_counted and is_undisturbed()):
            return
        known.calls[self._ways[0]] += 1
        if known.calls[self._ways[0]] != FEWEST_CALLS or len(outputs) != 1:
            return
        one = lambda leaves: tuple([x[0].detach() for x in leaves])  # noqa: E731
        for way in self._ways:
            if len(way) == 1:
                pairs = [((*one(tangents), *self._beside(outputs)), one(result))]
            else:
                pushed = products.pushforward_batch(tangents)
                pulled = products.pullback_batch(pushed)
                pairs = [(one(tangents), one(pushed)), (one(pushed), one(pulled))]
            if known.learn(self._at_batch, way, pairs, outputs[0]):
                return
