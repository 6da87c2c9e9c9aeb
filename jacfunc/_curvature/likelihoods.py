"""Draws targets from a module's predictions; their gradients make a Fisher matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from jacfunc._assembly import in_a_row
from jacfunc._types import Leaves

Likelihood = Literal["categorical", "gaussian"]


@dataclass(frozen=True)
class Drawn:
    """Gradients of log likelihoods at targets drawn from the module's own predictions."""

    cotangents: Leaves
    """The gradients, ``[R, B, *out]``."""

    @property
    def roots(self) -> Leaves:
        """Columns of ``S`` with ``H = S Sᵀ``: the gradients themselves."""
        return self.cotangents

    def times(self, tangents: Leaves) -> Leaves:
        """``H u = S (Sᵀ u)``, ``[B, *out]``."""
        pairs = list(zip(self.cotangents, tangents, strict=True))
        along = sum((in_a_row((s,)) * in_a_row((u.unsqueeze(0),))).sum(2) for s, u in pairs)
        assert isinstance(along, Tensor)
        return tuple(
            (s * along.reshape(*along.shape, *(1,) * (s.dim() - 2))).sum(0) for s, _ in pairs
        )


def drawn(
    api: str,
    likelihood: Likelihood,
    outputs: Leaves,
    draws: int,
    generator: torch.Generator | None,
    is_mean: bool,
) -> Drawn:
    """Draw targets, and return the gradients of their log likelihoods in the outputs."""
    scale = 1.0 / math.sqrt(draws * (outputs[0].shape[0] if is_mean else 1))
    score = _SCORES[likelihood]
    return Drawn(tuple(score(api, out, draws, generator) * scale for out in outputs))


def check_likelihood(api: str, likelihood: object, draws: object, reduction: object) -> None:
    """Raise ValueError for options of :func:`jacfunc.fisher` that are none."""
    if likelihood not in _SCORES:
        raise ValueError(
            f"{api}: likelihood must be one of {', '.join(map(repr, get_args(Likelihood)))}, got "
            f"{likelihood!r}. For another loss use jacfunc.ggn, which draws nothing."
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(
            f"{api}: draws must be a positive number of targets a sample, got {draws!r}. "
            "Pass draws=1, or more for less noise."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"{api}: reduction must be 'mean' or 'sum', got {reduction!r}. "
            "Choose as in the loss that is trained."
        )


def _categorical(api: str, logits: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """The gradients ``softmax - onehot``, ``[R, B, *out]``; classes are in the last dimension."""
    if logits.dim() < 2:
        raise ValueError(
            f"{api}: with likelihood='categorical' the last dimension of the outputs must hold "
            f"the classes, got shape {tuple(logits.shape)}. Return logits [B, …, C]."
        )
    chances = logits.softmax(-1)
    classes = torch.multinomial(chances.flatten(0, -2), draws, True, generator=generator)
    targets = classes.t().reshape(draws, *logits.shape[:-1])
    hits = torch.zeros_like(chances).expand(draws, *chances.shape)
    return chances - hits.scatter(-1, targets.unsqueeze(-1), 1.0)


def _gaussian(api: str, mean: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """The gradients ``mean - target``, ``[R, B, *out]``; the variance is one."""
    return torch.randn(
        (draws, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device
    )


_SCORES = {"categorical": _categorical, "gaussian": _gaussian}
