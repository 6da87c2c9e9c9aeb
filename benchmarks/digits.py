"""The data and the models: small networks trained for a few seconds on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
EPOCHS = 30
TRAINING_IMAGES = 1500
SEED = 0


def mlp() -> nn.Module:
    """64 - 32 - 10: 2,410 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    """Two convolutions and a linear layer: 1,898 parameters."""
    # Smooth throughout: at a tie of max pooling, float32 and float64 may take different branches
    # and the reference would then call a right answer wrong.
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def load() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` in 0 to 1, and labels ``[1797]``, in the data set's order."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32) / 16
    return pixels.reshape(-1, 1, 8, 8), torch.tensor(labels)


def held_out(batch: int) -> Tensor:
    """The first ``batch`` images that no model was trained on, ``[B, 1, 8, 8]``."""
    return load()[0][TRAINING_IMAGES : TRAINING_IMAGES + batch]


def train(name: str, on_epoch: Callable[[], None] = lambda: None) -> tuple[nn.Module, float]:
    """The named model, trained on the CPU from a fixed seed, and its accuracy on held-out images.

    The caller's random state is left as it was.
    """
    images, labels = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = MODELS[name]()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(TRAINING_IMAGES).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            on_epoch()
    model.zero_grad()
    with torch.no_grad():
        guesses = model(images[TRAINING_IMAGES:]).argmax(dim=1)
    return model.eval(), float((guesses == labels[TRAINING_IMAGES:]).float().mean())
