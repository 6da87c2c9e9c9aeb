"""Do samples of a batch depend on each other? Then a Jacobian of each alone would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jacfunc._draws import Draws
from jacfunc._trail import note
from jacfunc._types import Leaves

FEW = 4
"""Samples that make a batch: enough to depend on each other."""

Whole = Callable[[Leaves], Leaves]
"""The outputs of a whole batch, from its tensors."""


def check_coupling(
    api: str, whole: Whole, leaves: Leaves, dims: Sequence[int | None], alone: Leaves
) -> None:
    """Compare a small batch with its samples alone; where it is random, with another batch.

    Raises:
        ValueError: if a sample's output is another one in the batch.
    """
    draws = Draws(leaves)
    leaves = tuple(x if d is None else _few(x, d) for x, d in zip(leaves, dims, strict=True))
    alone = tuple(_few(out.detach(), 0) for out in alone)
    try:
        together = whole(leaves)
    except Exception as error:  # a module may take one sample alone
        note("the batch could not be evaluated as a whole, to see if samples depend: %s", error)
        return
    if draws.were_taken():
        # the same draws again, with the first sample replaced by the second: the rest must stay
        draws.repeat()
        alone = whole(tuple(_without_first(x, d) for x, d in zip(leaves, dims, strict=True)))
        together, alone = (
            tuple(out[1:] for out in outs if out.dim()) for outs in (together, alone)
        )
    for number, (out, own) in enumerate(zip(together, alone, strict=True)):
        if out.shape == own.shape and not _is_close(out, own):
            worst = float((out - own).abs().max())
            raise ValueError(
                f"{api}: per_sample needs samples that do not depend on each other, got a module "
                f"whose output {number} differs by {worst:.2g} between a sample in its batch and "
                "alone. Leave per_sample out, which differentiates the batch as a whole, or make "
                "the module independent of the rest of the batch."
            )


def _few(leaf: Tensor, dim: int) -> Tensor:
    return leaf.narrow(dim, 0, min(FEW, leaf.shape[dim]))


def _all_but_first(outputs: Leaves) -> Leaves:
    return tuple(out[1:] for out in outputs if out.dim())


def _without_first(leaf: Tensor, dim: int | None) -> Tensor:
    """The batch with its second sample twice."""
    if dim is None or leaf.shape[dim] < 2:
        return leaf
    changed = leaf.clone()
    changed.select(dim, 0).copy_(leaf.select(dim, 1))
    return changed


def _is_close(out: Tensor, own: Tensor) -> bool:
    """To the rounding of kernels that take other paths for other batches."""
    scale = own.abs().max() if own.numel() else 0.0
    tolerance = torch.finfo(out.dtype).eps ** 0.5
    return bool(
        torch.isclose(out, own, rtol=0, atol=float(tolerance * scale), equal_nan=True).all()
    )
