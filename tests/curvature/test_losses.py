"""Roots of second derivatives that are known, against Hessians that autograd gives in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian

import jacfunc
from jacfunc._curvature.known_losses import known_root

CLASSES = torch.tensor([0, 3, 2, -100, 1])


def hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    return loss


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


KNOWN = {
    "cross_entropy": (F.cross_entropy, numbers(5, 4).sin(), CLASSES),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), numbers(5, 4).sin(), CLASSES),
    "smoothed, summed, ignored": (
        nn.CrossEntropyLoss(label_smoothing=0.3, reduction="sum", ignore_index=3),
        numbers(5, 4).cos(),
        CLASSES.clamp(min=0),
    ),
    "settings in a partial": (
        partial(F.cross_entropy, reduction="sum", ignore_index=3, label_smoothing=0.1),
        numbers(5, 4).cos(),
        CLASSES.clamp(min=0),
    ),
    "one class": (F.cross_entropy, numbers(5, 1), torch.zeros(5, dtype=torch.long)),
    "mse_loss": (F.mse_loss, numbers(5, 2, 3), numbers(5, 2, 3).cos()),
    "MSELoss, summed": (nn.MSELoss(reduction="sum"), numbers(5), numbers(5).cos()),
    "BCE": (F.binary_cross_entropy_with_logits, numbers(5, 3), numbers(5, 3).sigmoid()),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), numbers(5, 3), numbers(5, 3).sigmoid()),
}

UNKNOWN = {
    "a function of one's own": (lambda x, y: F.mse_loss(x, y), numbers(5, 2), numbers(5, 2)),
    "class weights": (nn.CrossEntropyLoss(torch.ones(4)), numbers(5, 4), CLASSES),
    "weights of the positive": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        numbers(5, 3),
        numbers(5, 3).sigmoid(),
    ),
    "a hook": (hooked(), numbers(5, 4), CLASSES),
    "probabilities": (F.cross_entropy, numbers(5, 4), numbers(5, 4).softmax(1)),
    "positions": (F.cross_entropy, numbers(5, 4, 2), torch.zeros(5, 2, dtype=torch.long)),
    "broadcast": (F.mse_loss, numbers(5, 2), numbers(5, 1)),
    "a tree": (F.mse_loss, (numbers(5, 2),), numbers(5, 2)),
    "a weight in a partial": (partial(F.mse_loss, weight=numbers(5, 2)), *[numbers(5, 2)] * 2),
    "an old setting": (partial(F.mse_loss, size_average=False), *[numbers(5, 2)] * 2),
    "a loss without a formula": (F.poisson_nll_loss, numbers(5, 2), numbers(5, 2).exp()),
    "another loss": (F.huber_loss, numbers(5, 2), numbers(5, 2)),
    "another module": (nn.HuberLoss(), numbers(5, 2), numbers(5, 2)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_root_is_one_of_the_hessian(name: str) -> None:
    loss, outputs, targets = KNOWN[name]
    root = known_root(loss, outputs, targets)
    assert root is not None
    size = outputs.numel() // len(outputs)
    whole: Any = hessian(lambda x: loss(x, targets), outputs)
    blocks = whole.reshape(len(outputs), size, len(outputs), size)
    assert root.shape[:2] == (len(outputs), size)
    for b, columns in enumerate(root):
        torch.testing.assert_close(columns @ columns.T, blocks[b, :, b], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_what_is_not_known_there_is_none(name: str) -> None:
    loss, outputs, targets = UNKNOWN[name]
    assert known_root(loss, outputs, targets) is None


def test_certain_classes() -> None:
    """Where chances are below the smallest number, nothing is left, and no NaN."""
    outputs = torch.tensor([[900.0, 0.0, -900.0], [0.0, 40.0, 0.0]])
    root = known_root(F.cross_entropy, outputs, torch.tensor([0, 1]))
    assert root is not None
    found = (root @ root.mT)[1].diagonal()
    least = torch.exp(torch.tensor(-40.0, dtype=torch.float64)) / 2
    torch.testing.assert_close(found, torch.stack([least, 2 * least, least]), rtol=1e-12, atol=0.0)
    assert torch.equal(root[0], torch.zeros_like(root[0]))


@pytest.mark.parametrize(
    ("loss", "targets", "error", "message"),
    [
        (F.cross_entropy, torch.tensor([0, 7]), IndexError, "Target 7 is out of bounds"),
        (nn.CrossEntropyLoss(reduction="none"), torch.tensor([0, 1]), ValueError, "one number"),
    ],
)
def test_targets_and_reductions_are_checked(
    loss: Callable[..., Tensor], targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        jacfunc.ggn(nn.Linear(2, 3), loss)(torch.ones(2, 2), targets).diagonal()
