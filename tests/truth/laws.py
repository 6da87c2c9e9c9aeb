"""What must hold of every derivative, whatever the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import jacfunc
from tests.truth.oracles import (
    assert_same,
    float_leaves,
    is_real_tensor,
    leaves_of,
    place,
    tree_map,
)


def directions(tree: Any, seed: int) -> Any:
    """A random tree of tangents, or cotangents, for the floating leaves."""
    generator = torch.Generator().manual_seed(seed)
    return place(
        tree,
        [
            torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
            for leaf in float_leaves(tree)
        ],
    )


def inner(left: Any, right: Any) -> Tensor:
    """⟨left, right⟩ over all floating leaves, in float64."""
    terms = [
        (a.double() * b.double()).sum()
        for a, b in zip(float_leaves(left), float_leaves(right), strict=True)
    ]
    return torch.stack(terms).sum()


def contract(jacobian: Any, tangents: Any, output: Any) -> Any:
    """J v from the blocks of J: what a pushforward must agree with."""
    blocks, pieces = iter(float_leaves(jacobian)), float_leaves(tangents)
    products = []
    for out in float_leaves(output):
        terms = []
        for piece in pieces:
            matrix = next(blocks).reshape(out.numel(), piece.numel())
            terms.append(matrix.double() @ piece.double().reshape(-1))
        products.append(sum(terms).reshape(out.shape).to(out.dtype))
    return place(output, products)


def adjoint_identity(func: Callable[[Any], Any], point: Any) -> tuple[Tensor, Tensor]:
    """``⟨w, J v⟩`` and ``⟨Jᵀ w, v⟩``: to be equal."""
    tangents = directions(point, 1)
    output, pushed = jacfunc.jvp(func, (point,), (tangents,))
    cotangents = directions(output, 2)
    _, pullback = jacfunc.vjp(func, point)
    (pulled,) = pullback(cotangents)
    return inner(cotangents, pushed), inner(pulled, tangents)


def combine(a: float, left: Any, b: float, right: Any) -> Any:
    return place(
        left,
        [a * x + b * y for x, y in zip(float_leaves(left), float_leaves(right), strict=True)],
    )


def stacked(trees: list[Any]) -> Any:
    """Trees of one structure with a batch in front of every tensor."""
    flat = [[leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)] for tree in trees]
    rest = iter([torch.stack(column) for column in zip(*flat, strict=True)])
    return tree_map(lambda x: next(rest) if isinstance(x, Tensor) else x, trees[0])


def moved(point: Any, scale: float) -> Any:
    """The point a little away, in memory of its own."""
    return tree_map(lambda x: x * scale if is_real_tensor(x) else x, point)


class Snapshot:
    """The tensors of a tree as they are now: values, bytes, versions, flags."""

    def __init__(self, tree: Any) -> None:
        self._tensors = [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]
        self._seen = [self._state(tensor) for tensor in self._tensors]

    @staticmethod
    def _state(tensor: Tensor) -> tuple[Any, ...]:
        storage = bytes(tensor.detach().cpu().untyped_storage())
        return storage, tensor.stride(), tensor._version, tensor.requires_grad, tensor.grad

    def assert_unchanged(self) -> None:
        for tensor, seen in zip(self._tensors, self._seen, strict=True):
            now = self._state(tensor)
            assert now[0] == seen[0], "the bytes of an argument changed"
            assert now[1:4] == seen[1:4], "stride, version or requires_grad changed"
            assert now[4] is seen[4], "an argument gathered a gradient"


def assert_commutes_with_vmap(
    transform: Callable[..., Any], func: Callable[[Any], Any], points: list[Any]
) -> None:
    """Mapped over a stack, a transform gives the stack of its results."""
    mapped = jacfunc.vmap(transform(func))(stacked(points))
    singly = stacked([transform(func)(point) for point in points])
    assert_same(mapped, singly, rtol=1e-8, atol=1e-9)
