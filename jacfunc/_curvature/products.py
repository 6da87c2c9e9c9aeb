"""Products with the Jacobian of a whole batch, on graphs that are kept from product to product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import stack
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._curvature.whole_batch import (
    by_samples,
    check_shapes,
    multiplied,
    pushed_batch_on_graph,
    pushed_on_graph,
    pushing_operator,
    split,
)
from jacfunc._errors import RANDOM, Refused, is_out_of_memory
from jacfunc._linear_map import (
    JacobianOperator,
    check_agreement,
    check_transpose,
    chosen_leaves,
    nonzero_numbers,
    one_by_one,
)
from jacfunc._log import note
from jacfunc._modules import BatchOutputs, ModuleAtBatch, now_and_then
from jacfunc._torch import RandomState, noise_like
from jacfunc._types import Leaves

NOT_TRANSPOSED = (
    "its J v is not the transpose of its Jᵀ u: a hook or a backward pass of its own changes one of "
    "them alone, or is not linear"
)


Way: TypeAlias = Callable[["BatchProducts", Leaves], Leaves]
"""A way to take ``J v``."""


class BatchProducts:
    """``J v`` and ``Jᵀ u`` of all outputs of the batch.

    The first ``J v`` is a pushforward: by the evaluation that keeps the graph, if an earlier call
    of this kind has shown nothing to watch for, else by one before it. For the second, the graph of
    ``Jᵀ u``, which is linear in u, is made and kept: its pullback is ``J v``.

    A backward pass of the user's own, or one with hooks, may not be the transpose of the forward
    pass, or not be differentiable in u. So ``J v`` is compared with ``Jᵀ u`` for a random u, at the
    first points and now and then; the graph also for a random v, when it is made. Where neither way
    is right, rows of J are pulled back and multiplied by v.
    """

    def __init__(self, at_batch: ModuleAtBatch) -> None:
        flat = at_batch.call.flat_call()
        self._calls: list[FlatCall] = [flat]
        self._is_strict = at_batch.batch.samples.randomness == "error"
        vmapped = OfCalls(by_samples(at_batch, self._calls), flat.state)
        func = flat if self._is_strict else vmapped
        self._plain = JacobianOperator(func, tuple(map(Tensor.detach, flat.primals)))
        self._pulling = self._plain
        self._at_batch, self._state = at_batch, flat.state
        # no bound methods: they would make a cycle, which keeps the module and the batch alive
        self._ways: list[Way] = [
            BatchProducts._pushed_forward,
            BatchProducts._pushed_on_graph,
            BatchProducts._multiplied_by_rows,
        ]
        self._outputs: BatchOutputs | None = None
        self._trial: Leaves | None = None
        """``Jᵀ u`` of a random u."""
        self._is_compared = False

    @property
    def outputs(self) -> BatchOutputs:
        """What the module returns for the batch, evaluated with a graph."""
        # no cached_property: until Python 3.12 one lock of all instances is held meanwhile, and a
        # thread that waits for it may hold the lock that an evaluation waits for
        if self._outputs is None:
            with self._at_batch.undisturbed():
                self._outputs = self._evaluated_outputs()
        return self._outputs

    def _evaluated_outputs(self) -> BatchOutputs:
        at_batch = self._at_batch
        leaves, extras = self._evaluated(self._pulling)
        check_shapes(at_batch, leaves)
        return BatchOutputs(leaves, extras, self._calls[-1], at_batch.call.output_dims)

    def _evaluated(self, operator: JacobianOperator) -> tuple[Leaves, Leaves]:
        """Its outputs and extras, of samples that draw as the options say."""
        operator.rewind_generators()
        before = RandomState(self._at_batch.batch.samples.leaves)
        image = operator.image()
        if self._is_strict and before.has_changed():
            self._at_batch.batch.check_randomness(Refused(RANDOM))
        return image

    def pulled(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u``, ``[*param]``."""
        with self._at_batch.undisturbed(), self._in_words():
            of = nonzero_numbers(cotangents)
            chosen = chosen_leaves(cotangents, of)
            return self._on_graph(lambda pulling: pulling.pullback(chosen, of))

    def pulled_batch(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u`` of K vectors, ``[K, *param]``."""
        with self._at_batch.undisturbed(), self._in_words():
            of = nonzero_numbers(cotangents)
            chosen = chosen_leaves(cotangents, of)
            return self._on_graph(lambda pulling: pulling.pullback_batch(chosen, of))

    def pushed(self, tangents: Leaves) -> Leaves:
        """``J v``, ``[B, *out]``."""
        with self._at_batch.undisturbed(), self._in_words():
            while len(self._ways) > 1:
                way, *others = self._ways
                try:
                    products = way(self, tangents)
                except Refused as refusal:
                    self._leave(way, refusal)
                    continue
                if way is BatchProducts._pushed_forward:  # for the next, the graph pays
                    self._ways = [others[0], way, *others[1:]]
                return products
            return self._ways[0](self, tangents)

    def pushed_batch(self, tangents: Leaves) -> Leaves:
        """``J v`` of K vectors, ``[K, B, *out]``, at once where there is a graph for it."""
        on_graph = BatchProducts._pushed_on_graph
        if on_graph in self._ways:
            with self._at_batch.undisturbed(), self._in_words():
                try:
                    self._compare_graph()
                    return self._on_graph(partial(pushed_batch_on_graph, tangents=tangents))
                except Refused as refusal:
                    self._leave(on_graph, refusal)
        return one_by_one(self.pushed, tangents)

    def _leave(self, way: Way, refusal: Refused) -> None:
        """Try this way no more."""
        if str(refusal).startswith(f"{self._at_batch.api}: "):  # of the module, whichever the way
            raise refusal
        note("J v takes another way: %s", refusal)
        self._ways = [other for other in self._ways if other is not way]

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """A context in which refusals say which public function was called, and what it needs."""
        try:
            yield
        except Refused as refusal:
            if str(refusal).startswith(f"{self._at_batch.api}: "):
                raise
            raise Refused(
                f"{self._at_batch.api}: products need a module whose J v and Jᵀ u torch can take, "
                f"got a refusal: {refusal}. Use diagonal(), blocks() or matrix(), which need no "
                "J v."
            ) from refusal

    def _check(self, products: Leaves, tangents: Leaves) -> None:
        """Raise Refused unless ``⟨u, J v⟩ = ⟨Jᵀ u, v⟩``, for a random u and the tangents v."""
        cotangents = noise_like(self.outputs.leaves, seed=1)  # not kept: it may be large
        if self._trial is None:
            self._trial = self._on_graph(lambda pulling: pulling.pullback(cotangents))
        check_transpose(cotangents, products, self._trial, tangents, NOT_TRANSPOSED)

    def _pushed_forward(self, tangents: Leaves) -> Leaves:
        """``J v`` by a pushforward."""
        products = None if self._outputs else self._pushed_at_once(tangents)
        if products is None:
            self._plain.rewind_generators()
            pushing = self._plain.unevaluated()
            with torch.no_grad():  # results are detached
                products = pushing.pushforward(tangents)
            check_agreement(self.outputs.leaves, pushing.outputs)
            del pushing  # and outputs with it, which may be large
        pushed = products
        self._now_and_then("forward", lambda: self._check(pushed, tangents))
        return products

    def _pushed_at_once(self, tangents: Leaves) -> Leaves | None:
        """``J v`` by the evaluation that keeps the graph, in calls of a kind that needs no watch.

        None for other kinds, and where it fails: then two evaluations say why.
        """
        if (made := pushing_operator(self._plain, tangents)) is None:
            return None
        pulling, products = made
        try:
            self._evaluated(pulling)
        except Exception as error:  # of torch's forward mode, or of the module itself
            if is_out_of_memory(error):
                raise
            note("J v takes an evaluation of its own: %s", error)
            split(self._plain.func)
            return None
        pulling.func = self._plain.func  # the other one holds the tangents
        self._pulling = pulling
        self._calls[0].forget_outputs()
        _ = self.outputs
        return tuple(products)

    def _pushed_on_graph(self, tangents: Leaves) -> Leaves:
        """``J v`` by the pullback of ``Jᵀ u``."""
        self._compare_graph()
        return self._on_graph(partial(pushed_on_graph, tangents=tangents))

    def _compare_graph(self) -> None:
        """Compare products on the graph with pullbacks, once for this point."""
        if not self._is_compared:
            vector = noise_like(self._plain.primals, seed=2)
            products = partial(self._on_graph, partial(pushed_on_graph, tangents=vector))
            self._now_and_then("on graph", lambda: self._check(products(), vector))
            self._is_compared, self._trial = True, None

    def _on_graph(self, sweep: Callable[[JacobianOperator], Leaves]) -> Leaves:
        """A sweep of the graph; of a plain evaluation, where one with tangents left none for it."""
        try:
            return sweep(self._pulling)
        except Refused as refusal:
            if self._pulling is self._plain:
                raise
            note("the graph is that of an evaluation without tangents: %s", refusal)
        split(self._plain.func)
        self._pulling = self._plain
        check_agreement(self.outputs.leaves, self._plain.outputs)
        return sweep(self._plain)

    def _multiplied_by_rows(self, tangents: Leaves) -> Leaves:
        """``J v`` from rows of every sample's J, which are pulled back as factors."""
        pieces = self._at_batch.pieces(lambda _, jacobian: multiplied(jacobian, tangents))
        products = stack(pieces, self._at_batch.size)
        self._now_and_then("by rows", lambda: self._check(products, tangents))
        return products

    def _now_and_then(self, way: str, check: Callable[[], None]) -> None:
        """Run a check at the first calls of this kind, and then at fewer and fewer."""
        now_and_then(self._state, ("J v", way, self._at_batch.batch.kind.kind), check)
