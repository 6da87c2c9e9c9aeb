"""Products with the Jacobian of a whole batch, on graphs that are kept from product to product."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

import torch
from torch import Tensor

from jacfunc._assembly import stack
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._curvature.whole_batch import (
    Recorded,
    by_samples,
    check_alone,
    check_changed,
    check_shapes,
    multiplied,
    pushing_operator,
    split,
)
from jacfunc._errors import RANDOM, Refused, is_out_of_memory
from jacfunc._linear_map import (
    JacobianOperator,
    Linearization,
    check_agreement,
    check_transpose,
    one_by_one,
)
from jacfunc._log import note
from jacfunc._modules import ModuleAtBatch, now_and_then
from jacfunc._products import NOT_TRANSPOSED, PointProducts, Way
from jacfunc._torch import RandomState, noise_like
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves

INSTEAD = "Use diagonal(), blocks() or matrix(), or give it one sample."


class BatchProducts(PointProducts):
    """``J v`` and ``Jᵀ u`` of all outputs of the batch.

    The first ``J v`` is a pushforward: by the evaluation that keeps the graph, if an earlier call
    of this kind has shown nothing to watch for, else by one before it. For others, the graph of
    ``Jᵀ u``, which is linear in u, is made and kept: its pullback is ``J v``.

    A backward pass of the user's own, or one with hooks, may not be the transpose of the forward
    pass, or not be differentiable in u. So ``J v`` is compared with ``Jᵀ u`` for a random u, at the
    first points and now and then; the graph also for a random v, when it is made. Where neither way
    is right, rows of J are pulled back and multiplied by v. A way that was refused is not tried
    again.
    """

    words: ClassVar = (
        "products need a module whose J v and Jᵀ u torch can take",
        " Use diagonal(), blocks() or matrix(), which need no J v.",
        " Take fewer vectors at once.",
    )

    def __init__(self, at_batch: ModuleAtBatch) -> None:
        flat = at_batch.call.flat_call()
        self._calls: list[FlatCall] = [flat]
        self._is_strict = at_batch.batch.samples.randomness == "error"
        vmapped = OfCalls(by_samples(at_batch, self._calls), flat.state)
        self._recorded = Recorded(flat if self._is_strict else vmapped)
        self._plain = JacobianOperator(self._recorded, tuple(map(Tensor.detach, flat.primals)))
        plain = self._plain
        super().__init__(at_batch.api, lambda: plain, at_batch.undisturbed)
        self._is_transposed = True  # to be compared for random vectors
        self._at_batch, self._state = at_batch, flat.state
        self._left: list[Way] = []
        self._outputs: BatchOutputs | None = None
        self._trial: Leaves | None = None
        """``Jᵀ u`` of a random u."""
        self._is_compared = False
        self._operations: Hashable = None
        """What is known of those of the evaluation."""

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
        leaves, extras = self._evaluated(self._point)
        check_shapes(at_batch, leaves)
        return BatchOutputs(leaves, extras, self._calls[-1], at_batch.call.output_dims)

    def _evaluated(self, operator: JacobianOperator) -> tuple[Leaves, Leaves]:
        """Its outputs and extras, of samples that draw as the options say, as each does alone.

        Raises:
            Refused: if numbers of the batch lead another way than those of a sample alone.
        """
        operator.rewind_generators()
        batch = self._at_batch.batch
        before = RandomState(batch.samples.leaves)
        image, recorder = operator.image(), self._recorded.recorder
        if self._is_strict and before.has_drawn(self._calls[0], operator.primals):
            batch.check_randomness(Refused(RANDOM))
        if recorder.reads_values:
            check_shapes(self._at_batch, image[0])
            check_alone(batch, image[0], INSTEAD)
        check_changed(self._at_batch, recorder.operations)
        self._operations = recorder.signature, self._recorded.writes
        return image

    def _keep_graph(self) -> Linearization:
        _ = self.outputs
        return self._point.keep_graph()

    def _ways(self, tangents: Leaves) -> list[Way]:
        ways = super()._ways(tangents)
        if len(tangents[0]) > 1:  # all at once, where there is a graph for it
            ways.sort(key=lambda way: way is not BatchProducts._on_graph)
        return [way for way in ways if way not in self._left]

    def _leave(self, way: Way, refusal: Refused) -> None:
        if str(refusal).startswith(f"{self.api}: "):  # of the module, whichever the way
            raise refusal
        note("J v takes another way: %s", refusal)
        self._left.append(way)

    def _check(self, products: Leaves, tangents: Leaves) -> None:
        """Raise Refused unless ``⟨u, J v⟩ = ⟨Jᵀ u, v⟩``, for a random u and the tangents v."""
        cotangents = noise_like(self.outputs.leaves, seed=1)  # not kept: it may be large
        if self._trial is None:
            self._trial = _of_one(self._pulled, cotangents)
        vectors = cotangents, products, self._trial, tangents
        check_transpose(*vectors, NOT_TRANSPOSED, self._dtypes)

    def _pulled(self, cotangents: Leaves) -> Leaves:
        return self._or_plain(super()._pulled, cotangents)

    def _by_tangents(self, tangents: Leaves) -> Leaves:
        return one_by_one(self._pushed_forward, tangents)

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
        self._point = pulling
        self._calls[0].forget_outputs()
        _ = self.outputs
        return tuple(products)

    def _on_graph(self, tangents: Leaves) -> Leaves:
        on_graph = super()._on_graph
        if not self._is_compared:  # once for this point
            vector = noise_like(self._plain.primals, seed=2)

            def check() -> None:
                self._check(_of_one(lambda v: self._or_plain(on_graph, v), vector), vector)

            self._now_and_then("on graph", check)
            self._is_compared, self._trial = True, None
        return self._or_plain(on_graph, tangents)

    def _or_plain(self, sweep: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
        """A sweep of the graph; of a plain evaluation, where one with tangents left none for it."""
        try:
            return sweep(seeds)
        except Refused as refusal:
            if self._point is self._plain:
                raise
            note("the graph is that of an evaluation without tangents: %s", refusal)
        split(self._plain.func)
        self._point = self._plain
        check_agreement(self.outputs.leaves, self._plain.outputs)
        return sweep(seeds)

    def _by_rows(self, tangents: Leaves) -> Leaves:
        """``J v`` from rows of every sample's J, which are pulled back as factors."""
        return one_by_one(self._multiplied_by_rows, tangents)

    def _multiplied_by_rows(self, tangents: Leaves) -> Leaves:
        pieces = self._at_batch.pieces(lambda _, jacobian: multiplied(jacobian, tangents))
        products = stack(pieces, self._at_batch.size)
        self._now_and_then("by rows", lambda: self._check(products, tangents))
        return products

    def _now_and_then(self, way: str, check: Callable[[], None]) -> None:
        """Run a check at the first calls of these operations, and then at fewer and fewer."""
        _ = self.outputs
        kind = self._at_batch.batch.kind.kind, self._operations
        now_and_then(self._state, ("J v", way, *kind), check)


def _of_one(products_of: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
    """The products of one vector, by a function of K vectors."""
    return tuple(x[0] for x in products_of(tuple(seed.unsqueeze(0) for seed in seeds)))
