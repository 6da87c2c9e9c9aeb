"""The Gramian of a module's Jacobian at one batch or several, from the factors of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from jacfunc._assembly import Places, shared_units, stack
from jacfunc._factored import FactoredJacobian, NamedParts, Part, written
from jacfunc._kernels.blocks import product_of
from jacfunc._kernels.fitting import in_ranges
from jacfunc._kernels.kept import EVERY_AXIS, KeptRows, as_matrix
from jacfunc._memory import MULTIPLIED_BYTES
from jacfunc._modules import ModuleAtBatch
from jacfunc._rounding import contracting
from jacfunc._trees import flatten
from jacfunc._types import Leaves, is_tensor, product_dtype
from jacfunc.layers import Outer


def gram_of_samples(
    batches: Sequence[ModuleAtBatch], *, center: bool, dtype: torch.dtype
) -> Tensor:
    """``J Jᵀ`` of the only output ``[B, *out]`` at all batches, with rows in its order.

    Centred, it is that of ``J - 1 mᵀ`` with the mean m of samples' rows. Factors in float32 are
    those of one J, whose kernel is added up in float64, and then centred: nothing is lost as long
    as the mean is not 10⁸ times as large as what is left. So no row is written for it.
    """
    first_batch, budget = batches[0], batches[0].budget
    with budget.around():
        ranges = in_ranges([batches], EVERY_AXIS, first_batch.chunk_size, budget)
    with contracting(first_batch.params.values()), budget.around():
        places, precise = Places.of(first_batch.api, None), torch.float64 if center else dtype
        tree = product_of(ranges[0], ranges[0], EVERY_AXIS, None, places, precise)
        (kernel,) = filter(is_tensor, flatten(tree)[0])
        return as_matrix(kernel, center, dtype)


def variances_of_samples(
    at_batch: ModuleAtBatch, diagonal: Mapping[str, Tensor], kept: KeptRows | None
) -> Tensor:
    """``J_b S J_bᵀ`` of each sample's only output, ``[B, C, C]``, for a diagonal S by name.

    Args:
        kept: all rows, where they are kept.
    """
    params = at_batch.params

    def of_parts(out: Tensor, named: NamedParts) -> Tensor:
        shape = (len(out), *(out.shape[1:].numel(),) * 2)
        total = out.new_zeros(shape, dtype=product_dtype(out, *diagonal.values()))
        for name, parts in named.items():
            _add_variances(total, parts, params[name], diagonal[name])
        return total.to(out.dtype)

    def work(_: slice, jacobian: FactoredJacobian) -> Leaves:
        units, make = shared_units(jacobian.outputs), partial(of_parts, jacobian.outputs[0])
        return (at_batch.contracted(jacobian, units, make),)

    if kept is None:
        return stack(at_batch.pieces(work), at_batch.size)[0]
    with contracting(params.values()):
        pairs = zip(params, kept.parts, strict=True)
        return of_parts(kept.output, {name: parts for name, parts in pairs if parts})


def _add_variances(total: Tensor, parts: Sequence[Part], param: Tensor, diagonal: Tensor) -> None:
    """Add what one parameter contributes: from factors, or from rows of a few samples at a time."""
    form = parts[0].form if len(parts) == 1 and not parts[0].path else None
    if isinstance(form, Outer) and form.cotangents.shape[2:4] == (1, 1):
        inputs = form.inputs.to(total.dtype).flatten(1)
        seeds = form.cotangents.to(total.dtype).transpose(0, 1).flatten(2)  # [B, K, O]
        spread = diagonal.to(total.dtype).reshape(form.order[1:])
        spread = spread.T if form.is_transposed else spread
        weights = inputs.square() @ spread.T
        total.baddbmm_(seeds * weights.unsqueeze(1), seeds.mT)
        return
    start, spread = 0, diagonal.to(total.dtype).flatten()
    for block in written(parts, param, MULTIPLIED_BYTES):
        matrices = block.flatten(2).to(total.dtype)
        total[start : start + len(block)].baddbmm_(matrices * spread, matrices.mT)
        start += len(block)
