"""The standard basis of a tuple of leaves, a chunk at a time: a full ``eye(M)`` is M² numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from jacfunc._chunks import Chunk, in_chunks, of_leaf
from jacfunc._types import Leaves


def numel(leaves: Leaves) -> int:
    """Entries of all leaves together: one dimension of the Jacobian as a matrix."""
    return sum(leaf.numel() for leaf in leaves)


def basis(leaves: Leaves, chunk_size: int | None = None) -> Iterator[Leaves]:
    """Seeds e_0, e_1, … of the concatenated leaves in chunks of K: Leaves of ``[K, *shape]``.

    Leaves without an entry have one chunk, of no seeds.
    """
    total = numel(leaves)
    step = chunk_size or max(total, 1)
    for start in range(0, max(total, 1), step):
        yield unit_seeds(leaves, start, min(start + step, total))


def sweep(
    products_of: Callable[[Leaves], Leaves], leaves: Leaves, chunk: Chunk
) -> Iterator[Leaves]:
    """Products of the whole basis, chunk by chunk: Leaves of ``[K, *shape]``."""

    def products(start: int, stop: int) -> Leaves:
        return products_of(unit_seeds(leaves, start, stop))

    return in_chunks(numel(leaves), chunk, products)


def sweep_leaves(
    products_of: Callable[..., Leaves], leaves: Leaves, chunk: Chunk
) -> Iterator[Leaves]:
    """Products of the basis of one leaf after the other, each through that leaf alone.

    A zero seed at another leaf is no help where that has an infinite derivative: 0 · ∞ is nan.
    ``products_of(seeds, of=slice)`` gets the seeds of the leaves of the slice; no chunk has seeds
    of two leaves.
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
        yield from sweep(through, (leaf,), of_leaf(chunk, number))


def unit_seeds(leaves: Leaves, start: int, stop: int) -> Leaves:
    """Seeds number start to stop; each is one in a single entry of a single leaf."""
    with torch._C.DisableTorchFunction():  # a watch outside would look at every step
        return _unit_seeds(leaves, start, stop)


def _unit_seeds(leaves: Leaves, start: int, stop: int) -> Leaves:
    seeds, first = [], start
    for leaf in leaves:  # `first`: the leaf's entry that seed number start stands for
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
    """Unit seeds ``[K, B, *shape]`` for leaves ``[B, *shape]``, the same for all samples."""
    of_one = tuple(leaf[0] for leaf in leaves)
    seeds = unit_seeds(of_one, start, numel(of_one) if stop is None else stop)
    pairs = zip(seeds, leaves, strict=True)
    return tuple(s.unsqueeze(1).expand(len(s), *leaf.shape) for s, leaf in pairs)


def in_a_row(leaves: Leaves) -> Tensor:
    """``[R, B, *out]`` of all leaves as ``[R, B, M]``."""
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2)


def as_leaves(columns: Tensor, leaves: Leaves) -> Leaves:
    """``[R, B, M]`` as ``[R, B, *out]``, in the dtypes of the leaves ``[B, *out]``."""
    parts = columns.split([leaf[0].numel() for leaf in leaves], 2)
    pairs = zip(parts, leaves, strict=True)
    return tuple(part.reshape(len(columns), *x.shape).to(x.dtype) for part, x in pairs)
