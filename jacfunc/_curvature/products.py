"""A batch as one function of the parameters, on a graph to sweep over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import Refused
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
from jacfunc._trees import Split
from jacfunc._types import LeafFunction, Leaves, is_tensor

NOT_TRANSPOSED = (
    "its J v is not the transpose of its Jᵀ u: a hook or a backward pass of its own changes one of "
    "them alone"
)


class BatchProducts:
    """``J v`` and ``Jᵀ u`` of all outputs of the batch.

    The first ``J v`` pushes forward. For all others the graph of ``Jᵀ u`` is kept, which is linear
    in u: its own pullback saves the evaluation that a pushforward makes every time.

    A backward pass of the user's own, or one with hooks, need not be the transpose of the forward
    pass, nor differentiable in u. So what is pushed forward must be that of ``Jᵀ u`` for a random
    u, and the graph for a random v, too, when it is made: at the first points, and now and then.
    """

    def __init__(self, point: ModuleAtBatch) -> None:
        flat = point.call.flat_call(point.call.arguments, None)
        seen: list[FlatCall] = [flat]
        is_strict = point.batch.samples.randomness == "error"
        func = flat if is_strict else OfCalls(_mapped(point, seen), flat.state)
        # they require gradients for the graph of Jᵀ u alone
        self._pulling = JacobianOperator(
            func, tuple(primal.detach().requires_grad_() for primal in flat.primals)
        )
        self._point, self._state = point, flat.state
        # no bound methods: these would be a cycle, and keep the module and the batch
        self._ways = [BatchProducts._pushed_forward, BatchProducts._pushed_on_graph]
        with point.undisturbed():
            self._pulling.rewind_generators()
            before = RandomState(point.batch.samples.leaves)
            leaves, extras = self._pulling.image()
            if is_strict and before.has_changed():
                point.batch.check_randomness(RuntimeError("randomness"))
        for out in leaves:
            if not out.dim() or out.shape[0] != point.size:
                raise ValueError(
                    f"{point.api}: every output must have the batch in front, got shape "
                    f"{tuple(out.shape)} for a batch of {point.size}. Use a module that transposes "
                    "it, or that returns other outputs alone."
                )
        _check_shapes(point, leaves)
        self.outputs = BatchOutputs(leaves, extras, seen[-1])

    def pulled(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u``, ``[*param]``."""
        with self._point.undisturbed(), self._in_words():
            of = nonzero_numbers(cotangents)
            return self._pulling.pullback(chosen_leaves(cotangents, of), of)

    def pushed(self, tangents: Leaves) -> Leaves:
        """``J v``, ``[B, *out]``."""
        with self._point.undisturbed(), self._in_words():
            try:
                found = self._ways[0](self, tangents)
            except Refused as refusal:
                if len(self._ways) == 1:
                    raise
                note("J v takes the other way: %s", refusal)
                self._ways = self._ways[1:]
                return self._ways[0](self, tangents)
        if len(self._ways) > 1:
            self._ways = [BatchProducts._pushed_on_graph, BatchProducts._pushed_forward]
        return found

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Refusals say which door was called, and what it needs."""
        try:
            yield
        except Refused as refusal:
            raise Refused(
                f"{self._point.api}: products need a module whose J v and Jᵀ u torch can take, got "
                f"a refusal: {refusal}. Use diagonal(), blocks() or matrix(), which need no J v."
            ) from refusal

    def _check(self, products: Leaves, tangents: Leaves) -> None:
        """``⟨u, J v⟩ = ⟨Jᵀ u, v⟩`` for the random u."""
        cotangents, pulled = self._trial
        check_transpose(cotangents, products, pulled, tangents, NOT_TRANSPOSED)

    @cached_property
    def _trial(self) -> tuple[Leaves, Leaves]:
        """A random u, and ``Jᵀ u``."""
        cotangents = noise_like(self.outputs.leaves, seed=1)
        return cotangents, self._pulling.pullback(cotangents)

    def _pushed_forward(self, tangents: Leaves) -> Leaves:
        pushing = self._pulling.unevaluated()
        with torch.no_grad():  # results are detached
            products = pushing.pushforward(tangents)
        check_agreement(self.outputs.leaves, pushing.outputs)
        self._now_and_then("forward", lambda: self._check(products, tangents))
        return products

    def _pushed_on_graph(self, tangents: Leaves) -> Leaves:
        return self._transposed.pullback(tangents)

    @cached_property
    def _transposed(self) -> JacobianOperator:
        """``Jᵀ u`` as a function of u."""
        pulling = self._pulling.unevaluated()
        with torch.enable_grad():
            pulling.image()
        check_agreement(self.outputs.leaves, pulling.outputs)
        zeros = tuple(map(torch.zeros_like, self.outputs.leaves))
        transposed = JacobianOperator(lambda *u: (pulling.pullback(u), ()), zeros)

        def look() -> None:
            tangents = noise_like(self._pulling.primals, seed=2)
            self._check(transposed.pullback(tangents), tangents)

        self._now_and_then("on graph", look)
        return transposed

    def _now_and_then(self, way: str, look: Callable[[], None]) -> None:
        now_and_then(self._state, ("J v", way, self._point.batch.kind.kind), look)


def _check_shapes(point: ModuleAtBatch, outputs: Leaves) -> None:
    """Refuse ``[B, B]``: such rows are no outputs of a sample."""
    if point.size == 1 or not any(point.size in out.shape[1:] for out in outputs):
        return
    call, batch = point.call, point.batch
    fewer = narrowed(batch.samples.leaves, batch.samples.dims, 0, point.size - 1)
    flat = call.flat_call(Split.of(call.arguments, is_tensor).merge(fewer), None)
    with point.undisturbed():
        try:
            found, _ = flat(*map(Tensor.clone, flat.primals))
        except Exception as error:  # a module may take batches of one size
            note("whether outputs have a dimension of other samples was not seen: %s", error)
            return
    for out, of_fewer in zip(outputs, found, strict=True):
        if out.shape[1:] != of_fewer.shape[1:]:
            raise ValueError(
                f"{point.api}: outputs of a sample must have the same shape in every batch, got "
                f"shape {tuple(out.shape)} for {point.size} samples and {tuple(of_fewer.shape)} "
                f"for {point.size - 1}. Use a module that returns what belongs to each sample."
            )


def _mapped(point: ModuleAtBatch, seen: list[FlatCall]) -> LeafFunction:
    """The module of each sample, as random numbers are to be drawn; parameters are shared."""
    batch = point.batch

    def of_one(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
        call = batch.call_of(data)
        found = call(*params)
        seen[:] = [call]
        return found

    def of_all(*params: Tensor) -> tuple[Leaves, Leaves]:
        return batch.samples.map(of_one, params, [None] * len(params))

    return of_all
