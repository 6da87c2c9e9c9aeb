"""Roots of the second derivative in the outputs, for the losses of torch that have a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Settings: TypeAlias = Mapping[str, Any]
"""``reduction``, and ``ignore_index`` of cross entropy."""

Root: TypeAlias = Callable[[Tensor, Tensor, Settings], Tensor | None]
"""Makes ``S [B, M, R]`` with ``H = S Sᵀ`` for M outputs a sample, in double precision."""

DEFAULTS = {"reduction": "mean", "ignore_index": -100}
"""The settings of the losses that are functions."""


def known_root(loss: Any, outputs: Any, targets: Any) -> Tensor | None:
    """``S [B, M, R]`` with ``H = S Sᵀ``; None if there is no formula for the loss or arguments."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if type(loss) in MODULES and _is_plain(loss):
        return MODULES[type(loss)](outputs, targets, vars(loss))
    for known, root in FUNCTIONS:
        if loss is known:
            return root(outputs, targets, DEFAULTS)
    return None


def is_known(loss: Any) -> bool:
    """Is it a loss of torch that is a sum or mean over samples, with a formula here?"""
    return (type(loss) in MODULES and _is_plain(loss)) or any(loss is f for f, _ in FUNCTIONS)


def _is_plain(loss: nn.Module) -> bool:
    """Has the loss neither weights nor hooks?"""
    is_weighted = any(buffer is not None for buffer in loss._buffers.values())
    return not (is_weighted or loss._forward_hooks or loss._forward_pre_hooks)


def _of_cross_entropy(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor | None:
    """The Cholesky factor of ``diag(p) - p pᵀ``, from sums over the tails of p.

    Nothing is subtracted, so it is exact even for the least likely class. (Tanabe and Sagae, "An
    exact Cholesky decomposition and the generalized inverse of the variance-covariance matrix of
    the multinomial distribution", 1992.) Smoothed labels change the gradient alone.
    """
    if outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
        return None
    p = outputs.double().softmax(1)
    tails = p.flip(1).cumsum(1).flip(1)
    least = torch.finfo(p.dtype).tiny
    share, after = p[:, :-1] / tails[:, :-1].clamp(min=least), tails[:, 1:]
    counts = (targets != settings["ignore_index"]).to(p.dtype)
    weights = counts / counts.sum() if settings["reduction"] == "mean" else counts
    share = share * weights.unsqueeze(1)
    scales = (share / after.clamp(min=least)).sqrt()
    columns: Tensor = (-p.unsqueeze(2) * scales.unsqueeze(1)).tril_(-1)
    columns.diagonal(dim1=1, dim2=2).copy_((share * after).sqrt())
    return columns if columns.shape[2] else columns.new_zeros(len(p), 1, 1)


def _of_squares(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor | None:
    """The root for the squared error, whose second derivative is 2."""
    if outputs.shape != targets.shape:
        return None
    return _diagonal(torch.full_like(outputs, 2.0, dtype=torch.float64), settings)


def _of_logits(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor | None:
    """The root for the binary cross entropy of logits, whose second derivative is ``p (1 - p)``."""
    if outputs.shape != targets.shape:
        return None
    scores = outputs.double()
    return _diagonal(scores.sigmoid() * (-scores).sigmoid(), settings)


def _diagonal(curvature: Tensor, settings: Settings) -> Tensor:
    """The root for a loss that is a mean or sum over single outputs."""
    share = curvature.numel() if settings["reduction"] == "mean" else 1
    return (curvature / share).sqrt().reshape(len(curvature), -1).diag_embed()


FUNCTIONS: tuple[tuple[Any, Root], ...] = (
    (F.cross_entropy, _of_cross_entropy),
    (F.mse_loss, _of_squares),
    (F.binary_cross_entropy_with_logits, _of_logits),
)
MODULES: Mapping[type, Root] = {
    nn.CrossEntropyLoss: _of_cross_entropy,
    nn.MSELoss: _of_squares,
    nn.BCEWithLogitsLoss: _of_logits,
}
