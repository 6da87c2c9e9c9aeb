"""Ten losses lessened at once, none at the cost of another, by the Jacobian of all of them.

A network learns digits of which half the classes are rare, and each class has a loss of its own.
The gradient of the mean over all images may point where the loss of a rare class grows. Jacobian
descent steps against a direction d with ``J d ≥ 0``, J being the Jacobian of all losses: here
UPGrad, the mean of the gradients, each first projected onto the cone of such directions:

    d = (1/m) Σ_i Jᵀ v_i      v_i = argmin { vᵀ J Jᵀ v : v ≥ e_i }

Only ``J Jᵀ``, of ten rows, is needed to find the v_i. In every step the forward pass is made by the
training loop itself, and J comes from its graph.

Source: Quinton, Rey, "Jacobian descent for multi-objective optimization" (2024).

Run: ``python docs/gallery/jacobian_descent.py``

Comes out: along the gradient of the mean over images 7 % of the losses grow, step by step, and
20 % of held-out images of rare classes are named right; by Jacobian descent none grows, and 85 %
are. The mean over classes comes near to it: 1 % grow, 83 % are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc

STEPS, STEP = 60, 0.5
CLASSES, COMMON, FEW = 10, 5, 15
"""The first five classes are common; of the others few images are learned from."""
SWEEPS = 20


class Descent(NamedTuple):
    """What came of one way to descend.

    Args:
        worsened: share of steps and classes in which the direction lets the class's loss grow.
        common: accuracy on held-out images of the common classes.
        rare: accuracy on those of the rare ones.
    """

    worsened: float
    common: float
    rare: float


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``[n, 64]`` in 0 to 1 and labels: to learn from, and held out."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float64) / 16, torch.tensor(labels)
    number = F.one_hot(y, CLASSES).cumsum(0).gather(1, y.unsqueeze(1)).squeeze(1)  # in its class
    learned = number <= torch.where(y < COMMON, 100, FEW)
    held_out = number > 100
    return (x[learned], y[learned]), (x[held_out], y[held_out])


def losses_by_class(logits: Tensor, y: Tensor) -> Tensor:
    """The mean loss of each class, ``[10]``."""
    every = -logits.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    return torch.stack([every[y == label].mean() for label in range(CLASSES)])


def without_conflict(J: Tensor) -> Tensor:
    """The direction of UPGrad, from the Jacobian ``[10, P]`` of the losses."""
    gram = J @ J.T
    weights = torch.eye(CLASSES, dtype=J.dtype)  # v_i in row i
    least = weights.clone()
    for _ in range(SWEEPS):  # one entry of every v_i at a time
        for k in range(CLASSES):
            step = (weights @ gram[:, k]) / gram[k, k]
            weights[:, k] = (weights[:, k] - step).maximum(least[:, k])
    return weights.mean(0) @ J


def descend(direction_of: Callable[[Tensor, Tensor], Tensor]) -> Descent:
    """Train by the direction of a Jacobian and the labels, always from the same weights."""
    (x, y), (held_out, labels) = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    params = list(model.parameters())
    grown = 0
    for _ in range(STEPS):
        losses = losses_by_class(model(x), y)
        J = jacfunc.graph_jacobian(losses, params, flat=True)
        direction = direction_of(J, y)
        grown += int((J @ direction < -1e-9).sum())
        weights = nn.utils.parameters_to_vector(params).detach()
        nn.utils.vector_to_parameters(weights - STEP * direction, params)
    with torch.no_grad():
        is_right, is_common = model(held_out).argmax(1) == labels, labels < COMMON
    common, rare = (float(is_right[each].double().mean()) for each in (is_common, ~is_common))
    return Descent(grown / (STEPS * CLASSES), common, rare)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean over images": lambda J, y: (y.bincount() / len(y)).to(J) @ J,
    "mean over classes": lambda J, y: J.mean(0),
    "Jacobian descent": lambda J, y: without_conflict(J),
}


def main() -> dict[str, Descent]:
    """Print and return what comes of each way."""
    print("direction          losses that grow  right, common  right, rare")
    found = {}
    for name, direction_of in WAYS.items():
        found[name] = each = descend(direction_of)
        print(f"{name:17}  {each.worsened:16.3f}  {each.common:13.3f}  {each.rare:11.3f}")
    return found


if __name__ == "__main__":
    main()
