"""Roots of the second derivative in the outputs, for the losses of torch that have a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Settings: TypeAlias = Mapping[str, Any]
"""Settings of a loss, by the names of torch."""

Root: TypeAlias = Callable[[Tensor, Tensor, Settings], Tensor | None]
"""Makes ``S [B, M, R]`` with ``H = S Sᵀ`` for M outputs a sample, in double precision."""

DEFAULTS: Settings = {
    "weight": None,
    "pos_weight": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "log_input": True,
    "full": False,
    "eps": 1e-8,
}
"""The settings of a loss that is called without any."""


@dataclass(frozen=True)
class TorchLoss:
    """A loss of torch: its function, and the settings that it is called with."""

    function: Any
    own: Settings

    @classmethod
    def of(cls, loss: Any) -> TorchLoss | None:
        """From the function, by itself or with settings in a ``functools.partial``, or its module.

        None for what is no such loss, has hooks, or settings that are not known here.
        """
        own: Settings = {}
        if isinstance(loss, partial) and not loss.args:
            loss, own = loss.func, loss.keywords
        elif isinstance(loss, nn.Module):
            if loss._forward_hooks or loss._forward_pre_hooks:
                return None
            own = {name: getattr(loss, name) for name in DEFAULTS if hasattr(loss, name)}
            loss = FUNCTION_OF.get(type(loss))
        is_known = any(loss is function for function in FUNCTION_OF.values())
        return cls(loss, own) if is_known and own.keys() <= DEFAULTS.keys() else None

    @property
    def settings(self) -> Settings:
        """All settings."""
        return {**DEFAULTS, **self.own}

    @property
    def reduction(self) -> Any:
        """The reduction, if it was set."""
        return self.own.get("reduction")

    @property
    def root(self) -> Root | None:
        """The formula for a root, if there is one for the loss with these settings."""
        is_weighted = any(self.settings[name] is not None for name in ("weight", "pos_weight"))
        rows = (root for function, root in ROOTS if function is self.function)
        return None if is_weighted else next(rows, None)


def check_loss(api: str, loss: object) -> None:
    """Refuse what is no function, and a class of losses in the place of a loss."""
    if not callable(loss) or isinstance(loss, type):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(
            f"{api}: loss must be a function loss(outputs, targets), got {kind}. Pass "
            "torch.nn.functional.cross_entropy, or an instance of torch.nn.CrossEntropyLoss."
        )


def known_root(loss: Any, outputs: Any, targets: Any) -> Tensor | None:
    """``S [B, M, R]`` with ``H = S Sᵀ``; None if there is no formula for the loss or arguments."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    known = TorchLoss.of(loss)
    root = None if known is None else known.root
    return None if known is None or root is None else root(outputs, targets, known.settings)


def is_known(loss: Any) -> bool:
    """Is it a loss of torch that is a sum or mean over samples, with a formula here?"""
    known = TorchLoss.of(loss)
    return known is not None and known.root is not None


def _of_cross_entropy(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor | None:
    """A triangular factor of ``diag(p) - p pᵀ``, from sums over the first entries of p.

    Nothing is subtracted, so it is exact even for the least likely class. (Tanabe and Sagae, "An
    exact Cholesky decomposition and the generalized inverse of the variance-covariance matrix of
    the multinomial distribution", 1992; here in the reverse order of classes.) Smoothed labels
    change the gradient alone.
    """
    if outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
        return None
    if outputs.shape[1] < 2:
        return outputs.new_zeros((len(outputs), 1, 1), dtype=torch.float64)
    p = outputs.double().softmax(1)
    sums, least = p.cumsum(1), torch.finfo(p.dtype).tiny
    share, before = p[:, 1:] / sums[:, 1:].clamp(min=least), sums[:, :-1]
    counts = (targets != settings["ignore_index"]).to(p.dtype)
    weights = counts / counts.sum() if settings["reduction"] == "mean" else counts
    share *= weights.unsqueeze(1)
    scales = (share / before.clamp(min=least)).sqrt_()
    columns: Tensor = (p.unsqueeze(2) * scales.neg_().unsqueeze(1)).triu_()
    columns.diagonal(-1, 1, 2).copy_(share.mul_(before).sqrt_())
    return columns


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


ROOTS: tuple[tuple[Any, Root], ...] = (
    (F.cross_entropy, _of_cross_entropy),
    (F.mse_loss, _of_squares),
    (F.binary_cross_entropy_with_logits, _of_logits),
)
FUNCTION_OF: Mapping[type, Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
}
