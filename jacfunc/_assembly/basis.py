"""Seeds of a sweep: the standard basis of leaves, in chunks, as a full ``eye(M)`` is M² numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from jacfunc._memory import Chunk, in_chunks, of_leaf
from jacfunc._remembered import MOST_KINDS, Recent
from jacfunc._torch import makes_plain_tensors, untracked
from jacfunc._types import Leaves

FEW_NUMBERS = 2**12
"""Seeds of so few numbers are kept for later sweeps."""


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
    if stop is None:
        stop = sum(leaf.shape[1:].numel() for leaf in leaves)
    # on an accelerator another stream may run ahead of the one that made them
    can_be_kept = makes_plain_tensors() and all(leaf.is_cpu for leaf in leaves)
    kind = start, stop, *((leaf.shape, leaf.dtype) for leaf in leaves)
    seeds = _units().get(kind) if can_be_kept else None
    # a backward pass of the user's own may have written into them
    if seeds is not None and not any(seed._version for seed in seeds):
        return seeds
    of_one = tuple(leaf[0] if len(leaf) else leaf.new_empty(leaf.shape[1:]) for leaf in leaves)
    pairs = zip(unit_seeds(of_one, start, stop), leaves, strict=True)
    seeds = tuple(s.unsqueeze(1).expand(len(s), *leaf.shape) for s, leaf in pairs)
    if can_be_kept and numel(of_one) * (stop - start) <= FEW_NUMBERS:
        _units().put(kind, seeds)
    return seeds


@cache
def _units() -> Recent[Leaves]:
    """Small seeds of earlier sweeps."""
    return Recent(MOST_KINDS)


def in_a_row(leaves: Leaves) -> Tensor:
    """Leaves ``[R, B, *out]``, flattened and concatenated to ``[R, B, M]``."""
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2)


def as_leaves(columns: Tensor, leaves: Leaves) -> Leaves:
    """Columns ``[R, B, M]`` cut into ``[R, B, *out]``, in the dtypes of leaves ``[B, *out]``."""
    parts = columns.split([leaf[0].numel() for leaf in leaves], 2)
    pairs = zip(parts, leaves, strict=True)
    return tuple([part.reshape(len(columns), *x.shape).to(x.dtype) for part, x in pairs])
