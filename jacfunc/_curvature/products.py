"""Products with the Jacobian of a whole batch, on graphs that are kept from product to product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from jacfunc._assembly import stack
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import RANDOM, Refused
from jacfunc._factored import FactoredJacobian
from jacfunc._linear_map import (
    JacobianOperator,
    check_agreement,
    check_transpose,
    chosen_leaves,
    narrowed,
    nonzero_numbers,
)
from jacfunc._log import note
from jacfunc._modules import BatchOutputs, ModuleAtBatch, now_and_then
from jacfunc._torch import RandomState, noise_like
from jacfunc._types import LeafFunction, Leaves

NOT_TRANSPOSED = (
    "its J v is not the transpose of its Jᵀ u: a hook or a backward pass of its own changes one of "
    "them alone, or is not linear"
)


class BatchProducts:
    """``J v`` and ``Jᵀ u`` of all outputs of the batch.

    The first ``J v`` is a pushforward. For the second, the graph of ``Jᵀ u``, which is linear in u,
    is made and kept: its pullback is ``J v``, and needs no new evaluation as a pushforward does.

    A backward pass of the user's own, or one with hooks, may not be the transpose of the forward
    pass, or not be differentiable in u. So ``J v`` is compared with ``Jᵀ u`` for a random u, at the
    first points and now and then; the graph also for a random v, when it is made. Where neither way
    is right, rows of J are pulled back and multiplied by v.
    """

    def __init__(self, at_batch: ModuleAtBatch) -> None:
        flat = at_batch.call.flat_call()
        calls: list[FlatCall] = [flat]
        is_strict = at_batch.batch.samples.randomness == "error"
        func = flat if is_strict else OfCalls(by_samples(at_batch, calls), flat.state)
        # primals require gradients for the graph of Jᵀ u alone
        self._pulling = JacobianOperator(
            func, tuple(primal.detach().requires_grad_() for primal in flat.primals)
        )
        self._at_batch, self._state = at_batch, flat.state
        # no bound methods: they would make a cycle, which keeps the module and the batch alive
        self._ways = [
            BatchProducts._pushed_forward,
            BatchProducts._pushed_on_graph,
            BatchProducts._multiplied_by_rows,
        ]
        with at_batch.undisturbed():
            self._pulling.rewind_generators()
            before = RandomState(at_batch.batch.samples.leaves)
            leaves, extras = self._pulling.image()
            if is_strict and before.has_changed():
                at_batch.batch.check_randomness(Refused(RANDOM))
        for out in leaves:
            if not out.dim() or out.shape[0] != at_batch.size:
                raise ValueError(
                    f"{at_batch.api}: every output must have the batch in front, got shape "
                    f"{tuple(out.shape)} for a batch of {at_batch.size}. Use a module that "
                    "transposes it, or that returns other outputs alone; a lone sample needs a "
                    "batch of one."
                )
        _check_shapes(at_batch, leaves)
        self.outputs = BatchOutputs(leaves, extras, calls[-1], at_batch.call.output_dims)

    def pulled(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u``, ``[*param]``."""
        with self._at_batch.undisturbed(), self._in_words():
            of = nonzero_numbers(cotangents)
            return self._pulling.pullback(chosen_leaves(cotangents, of), of)

    def pushed(self, tangents: Leaves) -> Leaves:
        """``J v``, ``[B, *out]``."""
        with self._at_batch.undisturbed(), self._in_words():
            while len(self._ways) > 1:
                way, *others = self._ways
                try:
                    products = way(self, tangents)
                except Refused as refusal:
                    note("J v takes another way: %s", refusal)
                    self._ways = others
                    continue
                if way is BatchProducts._pushed_forward:  # for the next, the graph pays
                    self._ways = [others[0], way, *others[1:]]
                return products
            return self._ways[0](self, tangents)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """A context in which refusals say which public function was called, and what it needs."""
        try:
            yield
        except Refused as refusal:
            raise Refused(
                f"{self._at_batch.api}: products need a module whose J v and Jᵀ u torch can take, "
                f"got a refusal: {refusal}. Use diagonal(), blocks() or matrix(), which need no "
                "J v."
            ) from refusal

    def _check(self, products: Leaves, tangents: Leaves) -> None:
        """Raise Refused unless ``⟨u, J v⟩ = ⟨Jᵀ u, v⟩``, for a random u and the tangents v."""
        cotangents, pulled = self._trial
        check_transpose(cotangents, products, pulled, tangents, NOT_TRANSPOSED)

    @cached_property
    def _trial(self) -> tuple[Leaves, Leaves]:
        """A random u, and ``Jᵀ u``."""
        cotangents = noise_like(self.outputs.leaves, seed=1)
        return cotangents, self._pulling.pullback(cotangents)

    def _pushed_forward(self, tangents: Leaves) -> Leaves:
        """``J v`` by a pushforward."""
        pushing = self._pulling.unevaluated()
        with torch.no_grad():  # results are detached
            products = pushing.pushforward(tangents)
        check_agreement(self.outputs.leaves, pushing.outputs)
        self._now_and_then("forward", lambda: self._check(products, tangents))
        return products

    def _pushed_on_graph(self, tangents: Leaves) -> Leaves:
        """``J v`` by the pullback of ``Jᵀ u``."""
        return self._transposed.pullback(tangents)

    @cached_property
    def _transposed(self) -> JacobianOperator:
        """``Jᵀ u`` as a function of u, evaluated, whose graph is kept."""
        pulling = self._pulling.unevaluated()
        with torch.enable_grad():
            pulling.image()
        check_agreement(self.outputs.leaves, pulling.outputs)
        zeros = tuple(map(torch.zeros_like, self.outputs.leaves))
        transposed = JacobianOperator(lambda *u: (pulling.pullback(u), ()), zeros)

        def check() -> None:
            tangents = noise_like(self._pulling.primals, seed=2)
            self._check(transposed.pullback(tangents), tangents)

        self._now_and_then("on graph", check)
        return transposed

    def _multiplied_by_rows(self, tangents: Leaves) -> Leaves:
        """``J v`` from rows of every sample's J, which are pulled back as factors."""
        pieces = self._at_batch.pieces(lambda _, jacobian: _multiplied(jacobian, tangents))
        products = stack(pieces, self._at_batch.size)
        self._now_and_then("by rows", lambda: self._check(products, tangents))
        return products

    def _now_and_then(self, way: str, check: Callable[[], None]) -> None:
        """Run a check at the first calls of this kind, and then at fewer and fewer."""
        now_and_then(self._state, ("J v", way, self._at_batch.batch.kind.kind), check)


def _multiplied(jacobian: FactoredJacobian, tangents: Leaves) -> Leaves:
    """Every sample's J, a row after the other, times tangents of the parameters."""
    products, vector = [], torch.cat([v.flatten() for v in tangents])
    for number, out in enumerate(jacobian.outputs):
        columns = []
        for row in range(out[0].numel()):
            blocks = jacobian.rows(row, row + 1, number)
            flat = torch.cat([block.flatten(2) for block in blocks], 2)
            columns.append(flat @ vector)
        products.append(torch.cat(columns, 1).reshape(out.shape))
    return tuple(products)


def _check_shapes(at_batch: ModuleAtBatch, outputs: Leaves) -> None:
    """Raise ValueError if the shape of a sample's outputs depends on the size of the batch."""
    if at_batch.size == 1 or not any(at_batch.size in out.shape[1:] for out in outputs):
        return
    call, batch = at_batch.call, at_batch.batch
    fewer = narrowed(batch.samples.leaves, batch.samples.dims, 0, at_batch.size - 1)
    flat = call.flat_call(fewer)
    with at_batch.undisturbed():
        try:
            fewer_outputs, _ = flat(*map(Tensor.clone, flat.primals))
        except Exception as error:  # a module may take batches of one size
            note("whether outputs have a dimension of other samples was not seen: %s", error)
            return
    for out, smaller in zip(outputs, fewer_outputs, strict=True):
        if out.shape[1:] != smaller.shape[1:]:
            raise ValueError(
                f"{at_batch.api}: outputs of a sample must have the same shape in every batch, got "
                f"shape {tuple(out.shape)} for {at_batch.size} samples and {tuple(smaller.shape)} "
                f"for {at_batch.size - 1}. Use a module that returns what belongs to each sample."
            )


def by_samples(at_batch: ModuleAtBatch, calls: list[FlatCall]) -> LeafFunction:
    """The module as a function of its parameters that calls it for each sample, under vmap.

    ``calls`` then holds the call of a sample.
    """
    batch = at_batch.batch

    def of_one(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
        call = batch.call_of(data)
        outputs, extras = call(*params)
        calls[:] = [call]
        return outputs, extras

    def of_all(*params: Tensor) -> tuple[Leaves, Leaves]:
        return batch.samples.map(of_one, params, [None] * len(params))

    return of_all
