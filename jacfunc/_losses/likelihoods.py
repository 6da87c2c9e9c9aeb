"""Draws targets from a module's predictions; their gradients make a Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from jacfunc._losses.drawn import ClassColumns, Columns, ColumnsAt, DenseColumns, Draws
from jacfunc._losses.torch_losses import TorchLoss
from jacfunc._types import Leaves, product_dtype

Name: TypeAlias = Literal["categorical", "gaussian", "bernoulli"]
Likelihood: TypeAlias = Name | Callable[..., Tensor]
"""A likelihood by name, or a loss of torch that is minus the logarithm of one."""

Score: TypeAlias = Callable[[str, Tensor, int, torch.Generator | None, float], ColumnsAt]
"""Draws R targets for outputs, at which the gradients of ``-log p`` are scaled by a number."""


@dataclass(frozen=True)
class Predictive:
    """The distribution of targets that outputs of a module stand for.

    Args:
        score: draws from it.
        terms: how many terms the mean over a batch is divided by, for these outputs.
        loss: the name of the loss of torch that it is of; None for a likelihood by name.
    """

    score: Score
    terms: Callable[[Tensor], int]
    loss: str | None = None

    @classmethod
    def of(cls, api: str, likelihood: object, reduction: object) -> Predictive:
        """The distribution by its name, or by a loss.

        Raises:
            ValueError: another likelihood or reduction than there are.
        """
        if reduction is not None:
            _checked(api, reduction)
        loss = TorchLoss.of(likelihood)
        if isinstance(likelihood, str) and likelihood in _BY_NAME:
            return cls(_BY_NAME[likelihood], _one if reduction == "sum" else len)
        if loss is None or (row := _of_loss(loss)) is None:
            raise ValueError(
                f"{api}: likelihood must be one of {', '.join(map(repr, get_args(Name)))} or one "
                f"of torch's losses {', '.join(f.__name__ for f, _, _ in _BY_LOSS)}, got "
                f"{_in_words(likelihood)}. For another loss use jacfunc.ggn, which draws nothing."
            )
        own, name = loss.reduction, loss.function.__name__
        if own is not None and reduction not in (None, own):
            raise ValueError(
                f"{api}: reduction must be that of the loss, got {reduction!r} beside a {name} "
                f"with reduction={own!r}. Leave it out."
            )
        _check_is_likelihood(api, loss)
        score, terms = row
        is_mean = _checked(api, reduction or own or "mean") == "mean"
        return cls(score, terms if is_mean else _one, name)

    def drawn(
        self, api: str, outputs: Any, leaves: Leaves, draws: int, generator: torch.Generator | None
    ) -> Draws:
        """Draw targets, of which the gradients of ``-log p`` in the outputs are columns.

        Args:
            outputs: what the module returns.
            leaves: the tensors in it.
        """
        if self.loss is not None and not isinstance(outputs, Tensor):
            raise ValueError(
                f"{api}: with {self.loss} the module must return one tensor, got "
                f"{type(outputs).__name__}. Return what the loss is given."
            )
        scale = 1.0 / math.sqrt(draws * max(1, self.terms(leaves[0])))  # there may be no samples
        return Draws(tuple(self.score(api, out, draws, generator, scale) for out in leaves))


def check_draws(api: str, draws: object, generator: object) -> None:
    """Refuse all but a positive number of targets, and what draws none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{api}: generator must be a torch.Generator or None, got {type(generator).__name__}. "
            "Write torch.Generator().manual_seed(0) for a seed."
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(
            f"{api}: draws must be a positive number of targets a sample, got {draws!r}. "
            "Pass draws=1, or more for less noise."
        )


def _checked(api: str, reduction: object) -> object:
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(
            f"{api}: reduction must be 'mean' or 'sum', got {reduction!r}. "
            "Choose as in the loss that is trained."
        )
    return reduction


def _check_is_likelihood(api: str, loss: TorchLoss) -> None:
    """Refuse settings by which a loss is no longer minus the logarithm of a likelihood."""
    settings = loss.settings
    odd = [
        name
        for name, plain in {"weight": None, "pos_weight": None, "label_smoothing": 0.0}.items()
        if settings[name] is not plain and settings[name] != plain
    ]
    odd += ["ignore_index"] if settings["ignore_index"] >= 0 else []
    odd += [] if settings["log_input"] else ["log_input"]
    if odd:
        raise ValueError(
            f"{api}: the loss must be minus the logarithm of a likelihood of all targets that may "
            f"be drawn, got {loss.function.__name__} with {odd[0]} set. Leave it out, or "
            "use jacfunc.ggn, which draws nothing."
        )


def _one(outputs: Tensor) -> int:
    return 1


def _rows(outputs: Tensor) -> int:
    return outputs[:, 0].numel() if outputs.dim() > 1 else 1


def _of_loss(loss: TorchLoss) -> tuple[Score, Callable[[Tensor], int]] | None:
    rows = (row for row in _BY_LOSS if row[0] is loss.function)
    return next(((score, terms) for _, score, terms in rows), None)


def _in_words(likelihood: object) -> str:
    name = str(getattr(likelihood, "__name__", type(likelihood).__name__))
    if isinstance(likelihood, type):
        return f"the class {name}"
    return repr(likelihood) if isinstance(likelihood, str) else name


def _categorical(
    api: str,
    logits: Tensor,
    draws: int,
    generator: torch.Generator | None,
    scale: float,
    *,
    dim: int = -1,
) -> ColumnsAt:
    """The gradients ``softmax - onehot``; the classes are in one dimension of the outputs."""
    if logits.dim() < 2:
        where = "likelihood='categorical' the last dimension"
        raise ValueError(
            f"{api}: with {where if dim < 0 else f'cross_entropy dimension {dim}'} of the outputs "
            f"must hold the classes, got shape {tuple(logits.shape)}. Return logits "
            f"{'[B, …, C]' if dim < 0 else '[B, C, …]'}."
        )
    chances = logits.movedim(dim, -1).softmax(-1)
    classes = torch.multinomial(chances.flatten(0, -2), draws, True, generator=generator)
    classes = classes.view(*chances.shape[:-1], draws)

    def at(logits: Tensor) -> Columns:
        return ClassColumns(logits.movedim(dim, -1), classes, scale, dim)

    return at


def _written(
    gradients: Callable[[Tensor, int, torch.Generator | None], Tensor],
) -> Score:
    """A score of which all gradients are kept."""

    def score(
        api: str, outputs: Tensor, draws: int, generator: torch.Generator | None, scale: float
    ) -> ColumnsAt:
        columns = DenseColumns(gradients(outputs, draws, generator).mul_(scale))
        return lambda _: columns

    return score


def _gaussian(
    mean: Tensor, draws: int, generator: torch.Generator | None, *, variance: float = 1.0
) -> Tensor:
    """The gradients ``(mean - target) / variance``."""
    noise = torch.randn(
        (draws, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device
    )
    return noise.div_(math.sqrt(variance))


def _bernoulli(logits: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """The gradients ``sigmoid - target``, exact where a chance is almost one."""
    scores = logits.to(product_dtype(logits)).expand(draws, *logits.shape)
    hits = torch.bernoulli(scores.sigmoid(), generator=generator) == 1
    return torch.where(hits, -(-scores).sigmoid(), scores.sigmoid()).to(logits.dtype)


def _poisson(logs: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """The gradients ``rate - target``; outputs are the logarithms of rates."""
    rates = logs.to(product_dtype(logs)).exp().expand(draws, *logs.shape)
    return (rates - torch.poisson(rates, generator=generator)).to(logs.dtype)


_BY_NAME: Mapping[str, Score] = {
    "categorical": _categorical,
    "gaussian": _written(_gaussian),
    "bernoulli": _written(_bernoulli),
}
_BY_LOSS: tuple[tuple[Any, Score, Callable[[Tensor], int]], ...] = (
    (F.cross_entropy, partial(_categorical, dim=1), _rows),
    (F.mse_loss, _written(partial(_gaussian, variance=0.5)), Tensor.numel),
    (F.binary_cross_entropy_with_logits, _written(_bernoulli), Tensor.numel),
    (F.poisson_nll_loss, _written(_poisson), Tensor.numel),
)
"""Losses, draws from their likelihoods, and over how many terms they take the mean."""
