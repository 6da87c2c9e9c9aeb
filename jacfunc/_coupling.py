"""Do samples of a batch depend on each other? Then a Jacobian of each alone would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from jacfunc._batching import batch_size, narrowed
from jacfunc._draws import Draws
from jacfunc._known import KnownKinds
from jacfunc._trail import note
from jacfunc._types import Leaves

FEW = 4
"""Samples that make a batch: enough to depend on each other."""

COARSE = 0.1
"""Relative differences up to this may be another kernel's rounding, under autocast, say."""


@cache
def independent() -> KnownKinds:
    """Modules whose samples were found not to depend on each other, in this process."""
    return KnownKinds()


Whole = Callable[[Leaves], Leaves]
"""The outputs of a batch, from its tensors."""


def check_coupling(api: str, whole: Whole, leaves: Leaves, dims: Sequence[int | None]) -> None:
    """Compare a small batch with its samples alone.

    Where they differ by what might be rounding, or draw random numbers, another batch decides: one
    sample is changed, and the outputs of the others must stay.

    Raises:
        ValueError: if a sample's output is another one in the batch.
    """
    few = min(FEW, batch_size(leaves, dims))
    leaves = narrowed(tuple(leaf.detach() for leaf in leaves), dims, 0, few)
    before = Draws(leaves)
    try:
        together = whole(leaves)
    except Exception as error:  # a module may take one sample alone
        note("the batch could not be evaluated as a whole, to see if samples depend: %s", error)
        return
    is_random = before.were_taken()
    apart = 0.0 if is_random else _difference(together, _one_by_one(whole, leaves, dims))
    if is_random or 0.0 < apart <= COARSE:
        after = Draws(leaves)
        before.repeat()
        changed = whole(tuple(_changed(x, d) for x, d in zip(leaves, dims, strict=True)))
        apart = _difference(_all_but_first(together), _all_but_first(changed))
        if after.were_taken():
            note("how much is drawn depends on the data: whether samples depend was not seen")
            return
    if apart:
        raise ValueError(
            f"{api}: per_sample needs samples that do not depend on each other, got a module whose "
            f"outputs change by {apart:.2g} of their size with the other samples. "
            "Use per_sample=False, which differentiates the batch as a whole."
        )


def _one_by_one(whole: Whole, leaves: Leaves, dims: Sequence[int | None]) -> Leaves:
    numbers = range(batch_size(leaves, dims))
    singles = [whole(narrowed(leaves, dims, number, number + 1)) for number in numbers]
    # the loss of a sample has no batch in front: put together they are compared with nothing
    return tuple(torch.cat([x.flatten(0, 0) for x in out]) for out in zip(*singles, strict=True))


def _difference(outputs: Leaves, others: Leaves) -> float:
    """The largest relative difference; 0 where all are equal to the rounding of their dtype."""
    worst = 0.0
    for out, other in zip(outputs, others, strict=True):
        if out.shape != other.shape or not out.numel():  # a loss of the batch, not of samples
            continue
        apart, scale = (out - other).abs().nan_to_num(0.0).max(), other.abs().max()
        if apart > torch.finfo(out.dtype).eps ** 0.5 * scale:
            worst = max(worst, float(apart / scale) if scale else 1.0)
    return worst


def _all_but_first(outputs: Leaves) -> Leaves:
    return tuple(out[1:] for out in outputs if out.dim())


def _changed(leaf: Tensor, dim: int | None) -> Tensor:
    """The batch with its second sample twice."""
    if dim is None or leaf.shape[dim] < 2:
        return leaf
    changed = leaf.clone()
    changed.select(dim, 0).copy_(leaf.select(dim, 1))
    return changed
