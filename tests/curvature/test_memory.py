"""What products of a language model take, whose outputs are larger than all else: counted bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._memory.counting import PeakBytes

WORDS, TOKENS = 10_000, 128
LOGITS = WORDS * TOKENS * 4


class Language(nn.Module):
    """Logits of words; the samples are tokens, or sentences with the words in some dimension."""

    def __init__(self, arranged: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 4), nn.Linear(4, WORDS, bias=False)
        self.arranged = arranged

    def forward(self, tokens: Tensor) -> Tensor:
        return self.arranged(self.head(torch.tanh(self.embed(tokens))))


def as_they_are(logits: Tensor) -> Tensor:
    return logits


def words_first(logits: Tensor) -> Tensor:
    return logits.transpose(1, 2)


def ignoring(targets: Tensor) -> Tensor:
    return targets.where(torch.rand(targets.shape) < 0.8, -100)


WEIGHTED = nn.CrossEntropyLoss(torch.rand(WORDS), label_smoothing=0.1)
SUMMED = partial(F.cross_entropy, reduction="sum")
FORMS = {
    "tokens": (as_they_are, (TOKENS,), F.cross_entropy),
    "sentences": (words_first, (4, TOKENS // 4), F.cross_entropy),
    "one sentence": (words_first, (1, TOKENS), F.cross_entropy),
    "weighted": (words_first, (4, TOKENS // 4), WEIGHTED),
    "summed": (as_they_are, (TOKENS,), SUMMED),
}


def peaks_of(made: Callable[[], jacfunc.GaussNewton], model: nn.Module) -> list[float]:
    """Peaks in units of the logits: as it is made, and in each of three products."""
    peaks, counter = [], PeakBytes()
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    gc.collect()
    with counter:
        G = made()
    peaks.append(counter.peak / LOGITS)
    for _ in range(3):
        counter.peak = counter.live
        with counter:
            G @ vector
        peaks.append(counter.peak / LOGITS)
    return peaks


@pytest.mark.parametrize("name", FORMS)
def test_products_hold_five_times_the_logits(name: str) -> None:
    """Of the fifth the counter does not see: the cotangents of the graph of ``Jᵀ u``."""
    arranged, shape, loss = FORMS[name]
    model, tokens = Language(arranged), torch.randint(50, shape)
    targets = ignoring(torch.randint(WORDS, shape))
    assert max(peaks_of(lambda: jacfunc.ggn(model, loss)(tokens, targets), model)) <= 4.5


@pytest.mark.parametrize(
    ("name", "likelihood", "draws"),
    [
        ("tokens", "categorical", 1),
        ("tokens", F.cross_entropy, 3),
        ("sentences", F.cross_entropy, 1),
    ],
)
def test_fisher_matrices_hold_no_more(name: str, likelihood: Any, draws: int) -> None:
    arranged, shape, _ = FORMS[name]
    model, tokens = Language(arranged), torch.randint(50, shape)
    of = jacfunc.fisher(model, likelihood, draws=draws)
    assert max(peaks_of(lambda: of(tokens), model)) <= 4.5


def test_losses_of_single_outputs() -> None:
    model, tokens = Language(as_they_are), torch.randint(50, (TOKENS,))
    targets = torch.rand(TOKENS, WORDS)
    for loss in (F.mse_loss, F.binary_cross_entropy_with_logits):
        made = partial(jacfunc.ggn(model, loss, copy=False), tokens, targets)
        assert max(peaks_of(made, model)) <= 5
