"""The Gramian of a module's Jacobian at one batch or several, from the factors of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacfunc._assembly import Places
from jacfunc._kernels.blocks import KeptAxes, product_of
from jacfunc._kernels.fitting import in_ranges
from jacfunc._modules import ModuleAtBatch
from jacfunc._trees import flatten
from jacfunc._types import is_tensor


def gram_of_samples(
    batches: Sequence[ModuleAtBatch], *, center: bool, dtype: torch.dtype
) -> Tensor:
    """``J Jᵀ`` of the only output ``[B, *out]`` at all batches, with rows in its order.

    Centred, it is that of ``J - 1 mᵀ`` with the mean m of samples' rows. Factors in float32 are
    those of one J, whose kernel is added up in float64, and then centred: nothing is lost as long
    as the mean is not 10⁸ times as large as what is left. So no row is written for it.
    """
    axes, first_batch = KeptAxes((), ()), batches[0]
    ranges = in_ranges([batches], axes, first_batch.chunk_size, first_batch.budget)
    precise = torch.float64 if center else dtype
    with first_batch.contracting():
        places = Places.of(first_batch.api, None)
        tree = product_of(ranges[0], ranges[0], axes, None, places, precise)
        (kernel,) = filter(is_tensor, flatten(tree)[0])
        first, second, *out = kernel.shape
        width = torch.Size(out[: len(out) // 2]).numel()
        blocks: Tensor = kernel.reshape(first, second, width, width).transpose(1, 2)  # [B, C, B, C]
        if center:
            blocks = blocks - blocks.mean(0)
            blocks -= blocks.mean(2, keepdim=True)
        return blocks.reshape(first * width, second * width).to(dtype)
