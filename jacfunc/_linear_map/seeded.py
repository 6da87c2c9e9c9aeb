"""Products as torch differentiates them: by their seeds alone, or not at all.

The derivative of a linear map is the map itself for tangents, and its transpose for cotangents. So
no graph of the computation is needed, and the graph that torch keeps leads to the seeds alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._torch import inside_transform, untracked
from jacfunc._types import Leaves

FEW_NUMBERS = 2**14
"""Seeds of more numbers are not copied: that would take as long as it spares. Of no more, products
may be there twice for a moment."""

_REQUIRES_GRAD = attrgetter("requires_grad")


@dataclass(frozen=True, eq=False, slots=True)
class LinearMap:
    """A linear map from seeds to products, that torch can differentiate by its seeds.

    Args:
        one: the product of one seed, ``[*shape]``.
        many: the products of K seeds at once, ``[K, *shape]``.
        transpose: makes the transposed map.
    """

    one: Callable[[Leaves], Leaves]
    many: Callable[[Leaves], Leaves]
    transpose: Callable[[], LinearMap]

    @classmethod
    def of_batches(
        cls, products: Callable[[Leaves], Leaves], transpose: Callable[[], LinearMap]
    ) -> LinearMap:
        """A map whose every seed is K vectors in a row, ``[K, *shape]``, as operators take them."""

        def many(seeds: Leaves) -> Leaves:
            lead = seeds[0].shape[:2]
            flat = products(tuple(seed.flatten(0, 1) for seed in seeds))
            return tuple(each.unflatten(0, lead) for each in flat)

        return cls(products, many, transpose)

    def __call__(self, seeds: Leaves) -> Leaves:
        """The products, as a differentiable function of the seeds alone."""
        # a watch would take it for a function of the user's
        with torch._C.DisableTorchFunction():
            products: Leaves = _Product.apply(self, 0, *seeds)
        return products

    def swept(self, seeds: Leaves, depth: int) -> Leaves:
        """Products of seeds that have ``depth`` dimensions of batches in front."""
        if depth == 0:
            return self.one(seeds)
        lead = seeds[0].shape[:depth]
        products = self.many(tuple(seed.flatten(0, depth - 1) for seed in seeds))
        return tuple(product.unflatten(0, lead) for product in products)


def is_followed(seeds: Leaves) -> bool:
    """May a transform, or plain autograd, differentiate by these seeds?"""
    if torch.compiler.is_compiling():  # a compiler differentiates what it has traced
        return False
    if inside_transform():
        return True
    with untracked():  # a watch around a second derivative would take it for the function's own
        return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, seeds))


class _Product(torch.autograd.Function):
    """The autograd function of a linear map, at seeds that may have batches in front."""

    @staticmethod
    def forward(linear: LinearMap, depth: int, *seeds: Tensor) -> Leaves:
        if torch.compiler.is_compiling():
            return linear.swept(seeds, depth)
        # a sweep may evaluate the user's function for the first time, under a watch
        with torch._C._EnableTorchFunction():
            return linear.swept(seeds, depth)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.linear, ctx.depth = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, *_Product.apply(ctx.linear.transpose(), ctx.depth, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _linear: None, _depth: None, *tangents: Tensor) -> Leaves:
        products: Leaves = _Product.apply(ctx.linear, ctx.depth, *tangents)
        return products

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], linear: LinearMap, depth: int, *seeds: Tensor
    ) -> tuple[Leaves, tuple[int, ...]]:
        pairs = zip(seeds, in_dims[2:], strict=True)
        every = [
            seed.expand(info.batch_size, *seed.shape) if dim is None else seed.movedim(dim, 0)
            for seed, dim in pairs
        ]
        products: Leaves = _Product.apply(linear, depth + 1, *every)
        return products, (0,) * len(products)


def once(products: Leaves, outputs: Leaves, reason: str | None) -> Leaves:
    """The products, as tensors that raise when somebody differentiates them.

    They have no graph, but seem to depend on what an output that requires a gradient depends on.
    Without a reason they are returned as they are.
    """
    if reason is None or not torch.is_grad_enabled():
        return products
    output = next((out for out in outputs if out.requires_grad), outputs[0])
    return tuple([_raising_function(reason).apply(product, output) for product in products])


@cache
def _raising_function(reason: str) -> Any:
    """The identity as an autograd function whose backward pass raises for this reason."""

    class OnceAlone(torch.autograd.Function):
        once_alone = reason

        @staticmethod
        def forward(product: Tensor, output: Tensor) -> Tensor:
            return product.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing is saved."""

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise Refused(
                "backward: a Jacobian must not be differentiated where torch has no second "
                f"derivative, got one such ({reason}). Detach the Jacobian."
            )

        @staticmethod
        def vmap(info: Any, in_dims: Any, product: Tensor, output: Tensor) -> Any:
            return OnceAlone.apply(product, output), in_dims[0]

    return OnceAlone


def one_by_one(sweep: Callable[[Leaves], Leaves], seeds: Leaves) -> Leaves:
    """Products of K seeds ``[K, *shape]``, swept one after the other without vmap."""
    count = seeds[0].shape[0]
    products = map(sweep, zip(*map(Tensor.unbind, seeds), strict=True))
    first = next(products)
    if count == 1:
        left = [*first]
        del first  # each product is freed as soon as it is copied
        return tuple([torch.stack([left.pop(0)]) for _ in range(len(left))])
    are_few = count * sum(map(Tensor.numel, first)) <= FEW_NUMBERS
    if are_few or inside_transform() or not all(map(_is_bare, first)):
        return tuple(map(torch.stack, zip(first, *products, strict=True)))
    # each product is copied at once: all of them, and their copies, would take twice the result
    every = tuple(leaf.new_empty((count, *leaf.shape)) for leaf in first)
    for k, product in enumerate(chain((first,), products)):
        for rows, row in zip(every, product, strict=True):
            rows[k] = row
    return every


def _is_bare(leaf: Tensor) -> bool:
    """Is it numbers alone: no graph, no layout and no class of its own?"""
    return type(leaf) is Tensor and leaf.layout == torch.strided and not leaf.requires_grad
