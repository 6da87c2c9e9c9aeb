"""The Gauss-Newton matrix by products of the whole batch, and by sums over its samples.

Of the samples the columns of ``Jᵀ S`` are taken as parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import numel
from jacfunc._calls import BARE
from jacfunc._curvature.chosen import KnownLoss, ProductUnder, SquaresUnder, squares
from jacfunc._curvature.loss import OutputCurvature
from jacfunc._curvature.products import BatchProducts
from jacfunc._errors import Refused
from jacfunc._factored import FactoredJacobian, NamedParts, add_squares, rows, written
from jacfunc._linear_map import LinearMap, check_agreement
from jacfunc._lock import kept_property
from jacfunc._modules import ModuleAtBatch
from jacfunc._products import FactoredProducts, takes_factors
from jacfunc._settled import ProductsAgain
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves, product_dtype

CurvatureOf: TypeAlias = Callable[[BatchOutputs], OutputCurvature]
"""Gives ``H`` at outputs of the module."""

Add: TypeAlias = Callable[[torch.Size, NamedParts], None]
"""Adds the columns of some samples to a sum: how many samples and columns, and parts by name."""

NUMBERS_AT_ONCE = 2**24
"""How many numbers the outputs have together, of vectors that are multiplied at once."""

MOST_KEPT_BYTES = 2**28
"""So many bytes cotangents may take, of all outputs, from which products are taken."""


class MatrixProducts:
    """``G v`` by products with J, H and Jᵀ of the whole batch, whose samples may be coupled."""

    def __init__(
        self, at_batch: ModuleAtBatch, curvature_of: CurvatureOf, loss: KnownLoss | None
    ) -> None:
        self._at_batch, self._curvature_of = at_batch, curvature_of
        whole = (ProductUnder(loss.kind), loss.tensors, loss.beside) if loss else None
        self._again = ProductsAgain(at_batch, at_batch.products, whole)

    @kept_property
    def _jacobian(self) -> BatchProducts:
        jacobian = BatchProducts(self._at_batch)
        if (output := self._again.output) is not None:  # of an answer before
            check_agreement((output,), jacobian.outputs.leaves)
        return jacobian

    @kept_property
    def _curvature(self) -> OutputCurvature:
        """``H`` at the outputs of the module called with the batch."""
        if (output := self._again.output) is not None:
            return self._curvature_of(BatchOutputs((output,), (), BARE))
        return self._curvature_of(self._jacobian.outputs)

    def of_one(self, tangents: Leaves) -> Leaves:
        """``G v`` of one vector, ``[*param]``."""
        if takes_factors():
            rows = tuple([v[None] for v in tangents])
            products = factored_product(self._at_batch, self._curvature_of, rows)
        else:
            made = self._again.product(tangents, lambda u: self._curvature.times_batch(u))
            if made is not None:
                return made
            rows = tuple([v[None] for v in tangents])
            products = self._times(rows)
            self._again.learn(rows, products, self._jacobian, self._jacobian.outputs.leaves)
        return tuple([x[0] for x in products])

    def times(self, tangents: Leaves) -> Leaves:
        """``G v = Jᵀ H J v`` of K vectors, ``[K, *param]``, as many at once as room allows."""
        count = tangents[0].shape[0]
        if count == 1:
            return tuple([x[None] for x in self.of_one(tuple([v[0] for v in tangents]))])
        at_once = max(1, NUMBERS_AT_ONCE // max(1, numel(self._jacobian.outputs.leaves)))
        every = tuple(map(torch.empty_like, tangents))
        for start in range(0, count, at_once):
            some = slice(start, start + at_once)
            products = self._times(tuple(v[some] for v in tangents))
            for into, rows_of_some in zip(every, products, strict=True):
                into[some] = rows_of_some
        return every

    def _times(self, tangents: Leaves) -> Leaves:
        # first: then a single vector needs no room beside the outputs
        pushed = self._jacobian.pushforward_batch(tangents)
        weighted = self._curvature.times_batch(pushed)
        del pushed
        return self._jacobian.pullback_batch(weighted)

    def as_map(self) -> LinearMap:
        """The products as a map differentiable by the vectors; it is its own transpose."""
        return LinearMap.of_batches(self.times, self.as_map)


def added_up(point: ModuleAtBatch, curvature: OutputCurvature, add: Add, result: int) -> None:
    """Call ``add`` for some samples after the other, with a root S of their curvature.

    Args:
        result: bytes of the sum.
    """
    if not point.size:
        return
    roots = point.budget.keep(lambda: curvature.roots)

    def add_some(samples: slice, jacobian: FactoredJacobian) -> Leaves:
        cotangents = tuple([root[:, samples] for root in roots])
        num_roots, size = cotangents[0].shape[:2]
        at_once = point.budget.cotangents(max(1, num_roots), jacobian.nbytes)
        for start in range(0, max(1, num_roots), at_once):
            some = tuple([seeds[start : start + at_once] for seeds in cotangents])
            point.contracted(jacobian, some, partial(add, torch.Size((size, len(some[0])))))
        return ()

    for _ in point.pieces(add_some, result):
        """What was returned is empty: all is in the sum."""


def factored_product(
    point: ModuleAtBatch,
    curvature_of: Callable[[BatchOutputs], OutputCurvature],
    tangents: Leaves,
) -> Leaves:
    """``G v`` of one vector, ``[1, *param]``, from the factors of all samples.

    Raises:
        Refused: if they take much memory: then they save no time, either.
    """
    params = tuple(point.params.values())
    curvature = curvature_of(point.outputs)
    totals: Leaves = ()

    def add(_: torch.Size, parts: NamedParts) -> None:
        nonlocal totals
        jacobian = FactoredProducts([parts.get(name, []) for name in point.params], params)
        products = jacobian.pulled(jacobian.pushed(tuple(v[0] for v in tangents)))
        totals = tuple(map(torch.add, totals, products)) if totals else products

    size = sum(out[0].numel() for out in point.outputs.leaves)
    for pieces in point.pieces(lambda _, jacobian: _room_for(size, jacobian)):
        assert not pieces
    added_up(point, curvature, add, sum(param.nbytes for param in params))
    return tuple(total[None] for total in totals)


def _room_for(size: int, jacobian: FactoredJacobian) -> Leaves:
    """Raise Refused if cotangents of all ``size`` outputs of each sample take much memory."""
    nbytes = size * max(jacobian.nbytes, sum(out.nbytes for out in jacobian.outputs))
    if nbytes > MOST_KEPT_BYTES:
        raise Refused(f"cotangents of {size} outputs a sample would take {nbytes} bytes")
    return ()


class SampleSums:
    """``G`` from columns of ``Jᵀ S``, added up over samples, which must not be coupled.

    For each answer the module is lent once, if that may be.
    """

    def __init__(
        self, at_batch: ModuleAtBatch, curvature_of: CurvatureOf, loss: KnownLoss | None
    ) -> None:
        self._at_batch, self._curvature_of, self._loss = at_batch, curvature_of, loss

    @kept_property
    def _curvature(self) -> OutputCurvature:
        """``H`` at the outputs of the module called with each sample alone."""
        return self._curvature_of(self._at_batch.outputs)

    def squares(self) -> dict[str, Tensor]:
        """The diagonal: a tensor like each parameter, by name."""
        at_batch, totals = self._at_batch, dict[str, Tensor]()
        if (at_once := self._squares_at_once()) is not None:
            return dict(zip(at_batch.params, at_once, strict=True))
        with at_batch.as_one():
            params = at_batch.params

            def add(_: torch.Size, parts: NamedParts) -> None:
                add_squares(totals, {name: (parts[name], params[name]) for name in parts})

            added_up(at_batch, self._curvature, add, sum([p.nbytes for p in params.values()]))
        return {n: totals[n] if n in totals else torch.zeros_like(x) for n, x in params.items()}

    def _squares_at_once(self) -> Leaves | None:
        """The diagonal from one evaluation; None where calls have not settled all but numbers."""
        at_batch = self._at_batch
        is_whole = at_batch.budget.is_open and at_batch.chunk_size is None
        if not (is_whole and at_batch.is_lent_once):
            return None

        def beside(outputs: Leaves) -> Leaves:
            at_batch.evaluations.check((0, at_batch.size), outputs)
            if known is not None:
                return known.beside(outputs)
            return self._curvature_of(BatchOutputs(outputs, (), BARE)).roots

        known = self._loss if self._loss is not None and self._loss.is_convex else None
        return at_batch.made_at_once(SquaresUnder(known.kind) if known else squares, beside)

    def blocks(self) -> dict[str, Tensor]:
        """The diagonal blocks, ``[numel, numel]`` for each parameter."""
        params = self._at_batch.params
        totals = {
            name: p.new_zeros((p.numel(),) * 2, dtype=product_dtype(p))
            for name, p in params.items()
        }

        def add(_: torch.Size, parts: NamedParts) -> None:
            for name, param_parts in parts.items():
                for block in written(param_parts, params[name]):
                    flat = block.reshape(-1, params[name].numel())
                    totals[name].addmm_(flat.T, flat)

        self._add_up(add, sum(total.nbytes for total in totals.values()))
        return {name: total.to(params[name].dtype) for name, total in totals.items()}

    def matrix(self) -> Tensor:
        """The whole matrix."""
        params = self._at_batch.params
        diagonal = torch.cat([param.new_zeros(param.numel()) for param in params.values()])
        total = torch.diag(diagonal.to(product_dtype(diagonal)))

        def add(lead: torch.Size, parts: NamedParts) -> None:
            blocks = [
                rows(parts.get(name, []), partial(param.new_zeros, (*lead, *param.shape)))
                for name, param in params.items()
            ]
            flat = torch.cat([block.reshape(lead.numel(), -1) for block in blocks], 1)
            total.addmm_(flat.T.to(total.dtype), flat.to(total.dtype))

        self._add_up(add, total.nbytes)
        return total.to(diagonal.dtype)

    def _add_up(self, add: Add, result: int) -> None:
        with self._at_batch.as_one():
            added_up(self._at_batch, self._curvature, add, result)
