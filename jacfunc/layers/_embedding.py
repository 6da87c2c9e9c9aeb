"""Rules for lookups in tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc.layers._forms import Gather
from jacfunc.layers._rules import FormOf, rule


@rule(F.embedding, keeps_lead=True)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Mapping[str, FormOf]:
    """``z[…, d] = weight[input[…], d]``."""
    if max_norm is not None or scale_grad_by_freq:
        return {}
    shape, index = weight.shape[1:], input.reshape(len(input), -1).long()
    is_used = _is_used(input, shape, padding_idx)

    def of_weight(seeds: Tensor) -> Gather:
        cotangents = seeds if is_used is None else seeds * is_used.unsqueeze(-1)
        return Gather(index, cotangents.reshape(*seeds.shape[:2], -1, shape[1]), shape)

    return {"weight": of_weight}


@rule(torch.embedding)
def embedding_below(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Mapping[str, FormOf]:
    """The rule of :func:`embedding` for torch.embedding, which F.embedding calls."""
    padding = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


@rule(F.embedding_bag)
def bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Mapping[str, FormOf]:
    """``z[n, d] = Σₜ weight[input[n, t], d]``, or the mean, if all bags have the same length."""
    is_other = offsets is not None or per_sample_weights is not None or input.dim() != 3
    if is_other or max_norm is not None or scale_grad_by_freq or mode == "max":
        return {}
    shape = weight.shape[1:]
    is_used = _is_used(input, shape, padding_idx)
    share = torch.ones_like(input) if is_used is None else is_used.long()

    def of_weight(seeds: Tensor) -> Gather:
        shares = share.to(seeds.dtype).unsqueeze(-1)
        if mode == "mean":
            shares = shares / shares.sum(-2, keepdim=True).clamp(min=1)
        cotangents = (seeds.unsqueeze(-2) * shares).flatten(2, 3)
        return Gather(input.flatten(1).long(), cotangents, shape)

    return {"weight": of_weight}


def _is_used(index: Tensor, shape: torch.Size, padding: int | None) -> Tensor | None:
    """Which entries of the index are not padding, whose row has no gradient; None if all are."""
    return None if padding is None else index != padding % shape[0]
