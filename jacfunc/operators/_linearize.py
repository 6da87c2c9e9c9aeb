"""``linearize``: a function's value at a point, and its Jacobian there as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from jacfunc._assembly import sweep_leaves
from jacfunc._calls import at_all
from jacfunc._errors import Changes, Refused
from jacfunc._lending import Captured, Casting
from jacfunc._linear_map import (
    JacobianOperator,
    check_transpose,
    chosen_leaves,
    is_followed,
    nonzero_numbers,
    one_by_one,
)
from jacfunc._log import note
from jacfunc._torch import RandomState, makes_plain_tensors
from jacfunc._trees import map_tensors
from jacfunc._types import AuxT, Leaves, OutT, Tree
from jacfunc.operators._linear_operator import LinearOperator
from jacfunc.operators._products import MANY
from jacfunc.operators._space import Space
from jacfunc.strategies import in_words_of

MUST = "the function must be one that this product can be taken of"
INSTEAD = " Use the other product, or write the function in other operations."
LESS = " Take fewer vectors at once."
NOT_TRANSPOSED = (
    "its J v is not the transpose of its Jᵀ u: a hook or a backward pass of its own changes one of "
    "them alone, or is not linear"
)


@overload
def linearize(
    func: Callable[..., OutT], *primals: Tree, has_aux: Literal[False] = False
) -> tuple[OutT, LinearOperator]: ...
@overload
def linearize(
    func: Callable[..., tuple[OutT, AuxT]], *primals: Tree, has_aux: Literal[True]
) -> tuple[OutT, LinearOperator, AuxT]: ...
def linearize(func: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> tuple[Any, ...]:
    """The value of ``func`` and its Jacobian as a linear operator, by one evaluation.

    ``J v`` and ``Jᵀ u`` without J: ``value, J = linearize(func, x)``, then ``J @ v``, ``J.T @ u``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(value, J)`` or ``(value, J, aux)``. The domain of J are trees like the primal, or tuples
        of trees for more than one; its codomain trees like the value. It answers from the point at
        which it was made, with the random numbers that were drawn there. Where gradients are
        followed, products can be differentiated by the vector and by the primals.

    Raises:
        TypeError, ValueError: arguments that do not fit; a function that closes over tensors which
            have changed since. NotImplementedError: complex tensors, and what torch refuses.

    Cost:
        One evaluation, whose graph is kept: products with ``Jᵀ`` are pullbacks on it. A product
        with J before any with ``Jᵀ`` lets go of the graph, and is one evaluation with a tangent.
        After one with ``Jᵀ`` the graph is kept for good, and products with J take one pullback on
        the graph of a pullback. What torch can push through in neither way takes M pullbacks for a
        product with J. Beside it copies of the primals and of what ``func`` closes over.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(2))
        >>> value, J @ torch.tensor([1.0, 0.0]), J.T @ torch.tensor([0.0, 1.0])
        (tensor([3., 7.]), tensor([1., 3.]), tensor([3., 4.]))
    """
    api = "linearize"
    primals = map_tensors(Tensor.clone, primals)
    call = at_all(api, func, primals, has_aux)
    point = JacobianOperator(call, call.primals)
    point.rewind_generators()
    outputs, extras = in_words_of(api, point.image, MUST, INSTEAD, LESS)
    # the user may write into the value, and the graph needs its outputs
    value, aux = call.value(tuple(map(Tensor.clone, outputs)), extras)
    domain = Space.of(primals[0] if len(primals) == 1 else primals)
    captured = Captured.of(func) if makes_plain_tensors() else None
    casting = Casting.now(call.primals)

    @contextmanager
    def around() -> Iterator[None]:
        if captured is not None:
            captured.check(api, "the function")
        written = () if captured is None else captured.versions()
        # what is drawn outside of products does not depend on them
        drawing = nullcontext() if is_compiling() else RandomState(call.primals).kept()
        try:
            with drawing, casting.again():
                yield
        finally:
            if captured is not None and captured.undone(written):
                point.forget_graph()  # which may have kept what is written into again
        call.forget_outputs()

    is_differentiated = any(out.requires_grad for out in outputs)
    operator = Linearized(api, domain, Space.of(value), point, around, is_differentiated)
    call.forget_outputs()
    return (value, operator, aux) if has_aux else (value, operator)


class Linearized(LinearOperator):
    """The Jacobian of a function at a point; pullbacks keep the graph of the evaluation.

    Args:
        point: the function at the point, evaluated.
        around: a context for each product, in which the function may be evaluated again.
        is_differentiated: may products be differentiated by the primals?
    """

    def __init__(
        self,
        api: str,
        domain: Space,
        codomain: Space,
        point: JacobianOperator,
        around: Callable[[], AbstractContextManager[None]],
        is_differentiated: bool = False,
    ) -> None:
        super().__init__(api, domain, codomain)
        self._point, self._around = point, around
        point.stay_with_first()
        self._was_pulled = False
        self._is_differentiated = is_differentiated
        self._pair: tuple[bool, Leaves, Leaves] | None = None
        self._is_transposed = False

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        self._was_pulled = True
        return self._product(self._pulled, cotangents)

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        return self._product(self._pushed, tangents)

    def _product(self, products_of: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
        with self._around():
            products = in_words_of(self.api, lambda: products_of(seeds), MUST, INSTEAD, LESS)
        if not self._is_transposed and makes_plain_tensors() and seeds and len(seeds[0]):
            self._compare(products_of == self._pushed, seeds, products)
        return products

    def _compare(self, is_push: bool, seeds: Leaves, products: Leaves) -> None:
        """Check, once, that ``⟨u, J v⟩ = ⟨Jᵀ u, v⟩``, of the last v and u that were asked for.

        Hooks and backward passes of the user's own may change one of the two alone.
        """
        # copies: views would keep all seeds and products
        first = (
            tuple(x[0].detach().clone() for x in seeds),
            tuple(x[0].detach().clone() for x in products),
        )
        if self._pair is None or self._pair[0] == is_push:
            self._pair = is_push, *first
            return
        _, *other = self._pair
        (tangents, pushed), (cotangents, pulled) = (first, other) if is_push else (other, first)
        check = partial(check_transpose, cotangents, pushed, pulled, tangents, NOT_TRANSPOSED)
        in_words_of(self.api, check, MUST, INSTEAD, LESS)
        self._is_transposed, self._pair = True, None

    def _keep_graph(self) -> None:
        """Evaluate, if no graph is there, so that later products can be differentiated."""
        with torch.enable_grad() if self._is_differentiated else nullcontext():
            self._point.keep_graph()

    def _pulled(self, cotangents: Leaves) -> Leaves:
        self._keep_graph()
        pull, pull_batch = self._point.pullback, self._point.pullback_batch
        if is_followed(cotangents):
            return one_by_one(pull, cotangents)
        # zeros would spoil products at infinite derivatives
        of = nonzero_numbers(cotangents)
        if cotangents and not of:
            return tuple(x.new_zeros(len(cotangents[0]), *x.shape) for x in self.domain.leaves)
        cotangents = chosen_leaves(cotangents, of)
        if cotangents and len(cotangents[0]) == 1:
            return one_by_one(lambda seeds: pull(seeds, of), cotangents)
        return pull_batch(cotangents, of)

    def _pushed(self, tangents: Leaves) -> Leaves:
        ways = [self._by_tangents, self._on_graph]
        if self._is_differentiated and torch.is_grad_enabled():
            ways.pop()  # which knows nothing of the primals
        elif self._was_pulled:
            ways.reverse()
        for way in ways:
            try:
                return way(tangents)
            except Changes:  # of no other function is the product asked
                raise
            except Refused as refusal:
                note("J v takes another way: %s", refusal)
        return self._by_rows(tangents)

    def _by_tangents(self, tangents: Leaves) -> Leaves:
        """``J v`` by an evaluation with tangents."""
        if not self._was_pulled:
            self._point.forget_graph()
        if is_followed(tangents) or len(tangents[0]) == 1:
            return one_by_one(self._point.pushforward, tangents)
        return self._point.pushforward_batch(tangents)

    def _on_graph(self, tangents: Leaves) -> Leaves:
        """``J v`` as the transpose of ``Jᵀ u``, whose graph is kept."""
        self._keep_graph()
        transposed = self._point.transposed
        if transposed is None:
            raise Refused("torch can't push tangents forward through it")
        if is_followed(tangents) or len(tangents[0]) == 1:
            return one_by_one(transposed.pull, tangents)
        return transposed.pull_batch(tangents)

    def _by_rows(self, tangents: Leaves) -> Leaves:
        """``J v`` from all rows of J, which are pulled back: for what torch can't push through."""
        self._keep_graph()
        vectors = self.domain.rows(tangents).T

        def times(cotangents: Leaves, of: slice) -> Leaves:
            rows = self._point.pullback_batch(cotangents, of)
            return (self.domain.rows(rows) @ vectors,)

        chunks = sweep_leaves(times, self.codomain.leaves, MANY)
        columns = torch.cat([products for (products,) in chunks])
        return self.codomain.cut(columns.T)
