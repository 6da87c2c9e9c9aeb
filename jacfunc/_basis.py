"""The standard basis of a tuple of leaves, a chunk at a time: a full ``eye(M)`` is M² numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from jacfunc._check import is_out_of_memory
from jacfunc._types import Leaves

_log = logging.getLogger("jacfunc")


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
        yield _unit_seeds(leaves, start, min(start + step, total))


def sweep(
    products_of: Callable[[Leaves], Leaves], leaves: Leaves, chunk_size: int | None
) -> Iterator[Leaves]:
    """Products of the whole basis, chunk by chunk: Leaves of ``[K, *shape]``.

    Out of memory, the chunk is halved and taken again; what was yielded before stays.
    """
    total = numel(leaves)
    start, step = 0, chunk_size or max(total, 1)
    while start < max(total, 1):
        stop = min(start + step, total)
        try:
            yield products_of(_unit_seeds(leaves, start, stop))
        except RuntimeError as error:
            if stop - start <= 1 or not is_out_of_memory(error):
                raise
            step = (stop - start) // 2
            _log.info("out of memory with %d seeds at once, goes on with %d", stop - start, step)
        else:
            start = max(stop, 1)


def _unit_seeds(leaves: Leaves, start: int, stop: int) -> Leaves:
    """Seeds number start to stop; each is one in a single entry of a single leaf."""
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
