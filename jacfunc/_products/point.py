"""Products with the Jacobian of a function at a point, one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar, TypeAlias

import torch

from jacfunc._errors import Changes, Refused
from jacfunc._linear_map import (
    JacobianOperator,
    Linearization,
    check_transpose,
    chosen_leaves,
    is_followed,
    nonzero_numbers,
    one_by_one,
)
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._torch import makes_plain_tensors
from jacfunc._types import Leaves
from jacfunc.strategies import in_words_of

NOT_TRANSPOSED = (
    "its J v is not the transpose of its Jᵀ u: a hook or a backward pass of its own changes one of "
    "them alone, or is not linear"
)


class PointProducts:
    """Products with the Jacobian of a function at a point; pullbacks keep the graph of it.

    A subclass says how ``J v`` is taken from rows of J.

    Args:
        api: the name of the public function, with which error messages begin.
        point: makes the function at the point, when a product is first taken from it.
        around: a context for each product, in which the function may be evaluated again.
        is_differentiated: may products be differentiated by the primals?
    """

    words: ClassVar = (
        "the function must be one that this product can be taken of",
        " Use the other product, or write the function in other operations.",
        " Take fewer vectors at once.",
    )
    """What must hold, and what to do where a product is refused, or where memory runs out."""

    def __init__(
        self,
        api: str,
        point: Callable[[], JacobianOperator],
        around: Callable[[], AbstractContextManager[None]],
        is_differentiated: bool = False,
    ) -> None:
        self.api, self._point_now, self._around = api, point, around
        self._was_pulled = False
        self._is_differentiated = is_differentiated
        self._pair: tuple[bool, Leaves, Leaves] | None = None
        self._is_transposed = False

    @kept_property
    def _point(self) -> JacobianOperator:
        point = self._point_now()
        point.stay_with_first()
        return point

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u`` of K vectors, ``[K, *out]`` → ``[K, *in]``."""
        self._was_pulled = True
        return self._product(self._pulled, cotangents)

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        """``J v`` of K vectors, ``[K, *in]`` → ``[K, *out]``."""
        return self._product(self._pushed, tangents)

    def _product(self, products_of: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
        with self._around():
            products = in_words_of(self.api, lambda: products_of(seeds), *self.words)
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
        vectors = cotangents, pushed, pulled, tangents
        check = partial(check_transpose, *vectors, NOT_TRANSPOSED, self._dtypes)
        in_words_of(self.api, check, *self.words)
        self._is_transposed, self._pair = True, None

    def _dtypes(self) -> set[torch.dtype]:
        """The dtypes in which products are computed."""
        with self._around():
            return self._keep_graph().dtypes()

    def _keep_graph(self) -> Linearization:
        """Evaluate, if no graph is there, so that later products can be differentiated."""
        with torch.enable_grad() if self._is_differentiated else nullcontext():
            return self._point.keep_graph()

    def _pulled(self, cotangents: Leaves) -> Leaves:
        self._keep_graph()
        pull, pull_batch = self._point.pullback, self._point.pullback_batch
        if is_followed(cotangents):
            return one_by_one(pull, cotangents)
        # zeros would spoil products at infinite derivatives
        of = nonzero_numbers(cotangents)
        if cotangents and not of:
            return tuple(x.new_zeros(len(cotangents[0]), *x.shape) for x in self._point.primals)
        cotangents = chosen_leaves(cotangents, of)
        if cotangents and len(cotangents[0]) == 1:
            return one_by_one(lambda seeds: pull(seeds, of), cotangents)
        return pull_batch(cotangents, of)

    def _pushed(self, tangents: Leaves) -> Leaves:
        for way in self._ways(tangents):
            try:
                return way(self, tangents)
            except Refused as refusal:
                self._leave(way, refusal)
        return self._by_rows(tangents)

    def _ways(self, tangents: Leaves) -> list[Way]:
        """The ways to take ``J v``, but for rows, which come last."""
        ways: list[Way] = [type(self)._by_tangents, type(self)._on_graph]
        if self._is_differentiated and torch.is_grad_enabled():
            return ways[:1]  # the other result can't be differentiated by the primals
        return ways[::-1] if self._was_pulled else ways

    def _leave(self, way: Way, refusal: Refused) -> None:
        """Go on to the next way."""
        if isinstance(refusal, Changes):  # another evaluation would be of another function
            raise refusal
        note("J v takes another way: %s", refusal)

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
        is_one = is_followed(tangents) or len(tangents[0]) == 1
        push = partial(one_by_one, transposed.pull) if is_one else transposed.pull_batch
        return self._point.refusing("push along the graph", lambda: push(tangents))

    @abstractmethod
    def _by_rows(self, tangents: Leaves) -> Leaves:
        """``J v`` from all rows of J: for what torch can't push through."""


Way: TypeAlias = Callable[[PointProducts, Leaves], Leaves]
"""A way to take ``J v``."""
