"""A wide network trained on digits does what regression with its tangent kernel does.

Gradient descent with a small step hardly moves the weights of a wide network, so the network stays
linear in them: its outputs after t steps can be told from the kernel at the initial weights alone,

    f_t(x) = f_0(x) + K(x, X) K(X, X)⁻¹ (1 - (1 - η K(X, X))ᵗ) (y - f_0(X))

with the whole kernel ``[images · classes, images · classes]``, not only its trace over the classes.
What is left shrinks with the width, by about 1/√width.

Source: Jacot, Gabriel, Hongler, "Neural tangent kernel" (NeurIPS 2018); Lee et al., "Wide neural
networks of any depth evolve as linear models under gradient descent" (NeurIPS 2019).

Run: ``python docs/gallery/ntk_regression.py``

Comes out: at 1024 hidden units the kernel tells the trained network's outputs on test images to 4 %
of what training changed (20 % at 64), and the same digit for 98 % of them; 0.84 and 0.85 are right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc

CLASSES = 10
TRAINING_IMAGES, TEST_IMAGES = 150, 500
WIDTHS = (64, 256, 1024)
STEPS = 500


class Agreement(NamedTuple):
    """Of one width, on the images of the test.

    Args:
        difference: norm of the difference between network and kernel regression, relative to what
            training changed in the network's outputs.
        same_class: share of images of which both name the same digit.
        network_accuracy: of the network that was trained.
        kernel_accuracy: of the kernel regression.
    """

    difference: float
    same_class: float
    network_accuracy: float
    kernel_accuracy: float


class Network(nn.Module):
    """One hidden layer, scaled so that both layers keep their part in the kernel at any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.out = nn.Linear(width, CLASSES, bias=False)
        nn.init.normal_(self.hidden.weight, std=0.5)
        nn.init.normal_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.out(torch.tanh(self.hidden(x)))
        return outputs / math.sqrt(self.out.in_features)


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[n, 64]``, shuffled, their mean taken off, and labels."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))[: TRAINING_IMAGES + TEST_IMAGES]
    images = torch.tensor(pixels, dtype=torch.float32)[order] / 16
    return images - images[:TRAINING_IMAGES].mean(0), torch.tensor(labels)[order]


def kernel(model: nn.Module, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """Rows and columns are pairs of an image and a class."""
    blocks: Tensor = jacfunc.ntk(model, None, x1, x2)
    return blocks.double().transpose(1, 2).flatten(2).flatten(0, 1)


def train(model: nn.Module, x: Tensor, y: Tensor, rate: float) -> None:
    """Gradient descent on ``½ ‖f(x) - y‖²`` over the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum()).backward()
        optimizer.step()


def compare(width: int) -> Agreement:
    """Train a network of this width, and predict what comes out without training it."""
    torch.manual_seed(0)
    images, labels = digits()
    x, test_x = images.split([TRAINING_IMAGES, TEST_IMAGES])
    y = F.one_hot(labels[:TRAINING_IMAGES], CLASSES).float()
    model = Network(width)

    with torch.no_grad():
        start, test_start = model(x), model(test_x)
    values, vectors = torch.linalg.eigh(kernel(model, x))
    rate = float(1 / values.max())
    learned = (1 - (1 - rate * values) ** STEPS) / values
    weights = vectors @ (learned * (vectors.T @ (y - start).flatten().double()))
    change = kernel(model, test_x, x) @ weights
    predicted = test_start + change.view_as(test_start).float()

    train(model, x, y, rate)
    with torch.no_grad():
        found = model(test_x)
    guesses, predictions, truth = found.argmax(1), predicted.argmax(1), labels[TRAINING_IMAGES:]
    return Agreement(
        difference=float((found - predicted).norm() / (found - test_start).norm()),
        same_class=float((guesses == predictions).float().mean()),
        network_accuracy=float((guesses == truth).float().mean()),
        kernel_accuracy=float((predictions == truth).float().mean()),
    )


def main() -> dict[int, Agreement]:
    """Print and return the agreement by width."""
    found = {width: compare(width) for width in WIDTHS}
    print("width  difference  same class  accuracy of network  of kernel")
    for width, (difference, same, network, of_kernel) in found.items():
        print(f"{width:5}  {difference:10.3f}  {same:10.3f}  {network:19.3f}  {of_kernel:9.3f}")
    return found


if __name__ == "__main__":
    main()
