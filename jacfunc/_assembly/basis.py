"""Seeds of a sweep: the standard basis of leaves, in chunks, as a full ``eye(M)`` is M² numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from jacfunc._memory import Chunk, in_chunks, of_leaf
from jacfunc._torch import untracked
from jacfunc._types import Leaves


def numel(leaves: Leaves) -> int:
    """How many numbers the leaves hold: the rows or columns of the Jacobian as a matrix."""
    return sum(leaf.numel() for leaf in leaves)


def basis(leaves: Leaves, chunk_size: int | None = None) -> Iterator[Leaves]:
    """Unit seeds e_0, e_1, … of the concatenated leaves, in chunks ``[K, *shape]``.

    Leaves that hold no number have one chunk of no seeds.
    """
    total = numel(leaves)
    step = chunk_size or max(total, 1)
    for start in range(0, max(total, 1), step):
        yield unit_seeds(leaves, start, min(start + step, total))


def sweep(
    products_of: Callable[[Leaves], Leaves], leaves: Leaves, chunk: Chunk
) -> Iterator[Leaves]:
    """Products of all unit seeds of the leaves, in chunks ``[K, *shape]``."""

    def products(start: int, stop: int) -> Leaves:
        return products_of(unit_seeds(leaves, start, stop))

    return in_chunks(numel(leaves), chunk, products)


def sweep_leaves(
    products_of: Callable[..., Leaves], leaves: Leaves, chunk: Chunk
) -> Iterator[Leaves]:
    """Products of all unit seeds of one leaf after the other, each swept through that leaf alone.

    A zero seed at a leaf with an infinite derivative would spoil products, as 0 · ∞ is nan. So
    ``products_of(seeds, of=slice)`` gets the seeds of one leaf, and the slice that holds it.
    """
    if len(leaves) == 1:
        return sweep(partial(products_of, of=slice(0, 1)), leaves, chunk)
    return _leaf_by_leaf(products_of, leaves, chunk)


def _leaf_by_leaf(
    products_of: Callable[..., Leaves], leaves: Leaves, chunk: Chunk
) -> Iterator[Leaves]:
    if not leaves:
        yield products_of((), of=slice(0, 0))
    for number, leaf in enumerate(leaves):
        through = partial(products_of, of=slice(number, number + 1))
        yield from sweep(through, (leaf,), of_leaf(chunk, number) if number else chunk)


def unit_seeds(leaves: Leaves, start: int, stop: int) -> Leaves:
    """Seeds number start to stop of the basis; each is one at a single number of a single leaf."""
    with untracked():
        return _unit_seeds(leaves, start, stop)


def _unit_seeds(leaves: Leaves, start: int, stop: int) -> Leaves:
    seeds, first = [], start
    for leaf in leaves:  # `first`: the number in this leaf at which seed `start` is one
        shape = (stop - start, leaf.numel())
        if first == 0:
            seed = torch.eye(*shape, dtype=leaf.dtype, device=leaf.device)
        else:
            seed = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
            if -shape[0] < first < shape[1]:
                seed.diagonal(first).fill_(1)
        seeds.append(seed if leaf.dim() == 1 else seed.view(shape[:1] + leaf.shape))
        first -= shape[1]
    return tuple(seeds)


def shared_units(leaves: Leaves, start: int = 0, stop: int | None = None) -> Leaves:
    """Unit seeds ``[K, B, *shape]`` for leaves ``[B, *shape]``, shared by all samples."""
    of_one = tuple(leaf[0] for leaf in leaves)
    seeds = unit_seeds(of_one, start, numel(of_one) if stop is None else stop)
    pairs = zip(seeds, leaves, strict=True)
    return tuple(s.unsqueeze(1).expand(len(s), *leaf.shape) for s, leaf in pairs)


def in_a_row(leaves: Leaves) -> Tensor:
    """Leaves ``[R, B, *out]``, flattened and concatenated to ``[R, B, M]``."""
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2)


def as_leaves(columns: Tensor, leaves: Leaves) -> Leaves:
    """Columns ``[R, B, M]`` cut into ``[R, B, *out]``, in the dtypes of leaves ``[B, *out]``."""
    parts = columns.split([leaf[0].numel() for leaf in leaves], 2)
    pairs = zip(parts, leaves, strict=True)
    return tuple(part.reshape(len(columns), *x.shape).to(x.dtype) for part, x in pairs)
