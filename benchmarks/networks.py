"""Small classifiers of 28 × 28 images, for what is measured without any data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
PIXELS = 28


def mlp() -> nn.Module:
    """A perceptron of 228,490 parameters, most of them in the first layer."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(PIXELS**2, 224), nn.ReLU()),
        *(nn.Linear(224, 224), nn.ReLU()),
        nn.Linear(224, CLASSES),
    )


def cnn() -> nn.Module:
    """LeNet with ReLU and as many channels as a whole batch of pullbacks has room for."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(32 * 7 * 7, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, CLASSES),
    )


def perceptron() -> nn.Module:
    """A perceptron of 535,818 parameters, whose Jacobian outgrows every cache."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(PIXELS**2, 512), nn.ReLU()),
        *(nn.Linear(512, 256), nn.ReLU()),
        nn.Linear(256, CLASSES),
    )


def lenet() -> nn.Module:
    """LeNet-5 as it is taught: 61,706 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * 5 * 5, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, CLASSES),
    )


class Recurrent(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.read = nn.GRU(PIXELS, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.read(images.flatten(1, 2))[0][:, -1])
        return scores


class Transformer(nn.Module):
    """Two pre-norm encoder layers on 16 patches of 7 × 7 pixels.

    Every parameter lies in a layer that hooks can see, and the positions are constants: the
    libraries that work by hooks would refuse anything else.
    """

    def __init__(self, patch: int = 7, width: int = 72, depth: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.layers = nn.Sequential(*(_Layer(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("positions", torch.randn((PIXELS // patch) ** 2, width) / 5)

    def forward(self, images: Tensor) -> Tensor:
        tiles = images.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        # [B, 1, rows, patch, columns, patch] to one row of pixels a patch
        patches = tiles.transpose(-3, -2).flatten(1, 3).flatten(2)
        tokens = self.layers(self.embed(patches) + self.positions)
        scores: Tensor = self.head(self.norm(tokens).mean(1))
        return scores


class _Layer(nn.Module):
    """Attention, written out so that each parameter is a linear layer's, then a perceptron."""

    def __init__(self, width: int, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.before(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(seen)
        narrowed: Tensor = self.narrow(F.gelu(self.widen(self.between(tokens))))
        return tokens + narrowed


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": Transformer,
}
"""Of which every per-sample Jacobian is measured."""

LARGE, LENET, SHORT, RECURRENT = "mlp of 536k", "lenet", "transformer of 4 patches", "gru"
STRUCTURED: dict[str, Callable[[], nn.Module]] = {
    LARGE: perceptron,
    LENET: lenet,
    "transformer": Transformer,
    SHORT: partial(Transformer, PIXELS // 2),
    RECURRENT: Recurrent,
}
"""Of which kernels and curvature are measured, too."""


def build(name: str) -> nn.Module:
    """The network of this name in eval mode, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (NETWORKS | STRUCTURED)[name]().eval()
