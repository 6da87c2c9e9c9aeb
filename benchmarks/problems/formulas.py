"""Functions of one tensor, of every shape; those with ``xp`` can be had in JAX's words, too."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
Made = tuple[Callable[..., Any], Tensor]  # a function, and a point


def drawing(dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """``draw(*shape)``: normal numbers, always the same, and in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(size=shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def mlp(inputs: int, outputs: int, width: int, draw: Any, xp: Any = torch) -> Made:
    """Inputs - width - width - outputs, tanh."""
    first, second, last = mlp_weights(inputs, outputs, width, draw)
    return lambda x: last @ xp.tanh(second @ xp.tanh(first @ x)), draw(inputs)


def mlp_weights(inputs: int, outputs: int, width: int, draw: Any) -> list[Tensor]:
    return [draw(b, a) / a**0.5 for a, b in pairwise((inputs, width, width, outputs))]


def stencil(size: int, draw: Any) -> Made:
    """Reaction and diffusion in one dimension, Python numbers among its factors."""

    def func(u: Tensor) -> Tensor:
        padded = F.pad(u, (1, 1))
        return 0.1 * (padded[2:] - 2 * u + padded[:-2]) + u * (1 - u) * 0.5

    return func, draw(size)


def heat(side: int, draw: Any) -> Made:
    """The five points of a Laplacian in two dimensions, by convolution, and a nonlinearity."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)

    func = lambda u: F.conv2d(u[None, None], kernel.to(u), padding=1)[0, 0] + torch.sin(u)  # noqa: E731
    return func, draw(side, side)


def orbit(steps: int, draw: Any, xp: Any = torch) -> Made:
    """Runge–Kutta steps of a small system: many operations on few numbers."""
    matrix = draw(4, 4) / 4

    def func(x: Any) -> Any:
        for _ in range(steps):
            slope = xp.tanh(matrix @ x)
            x = x + 0.1 * xp.tanh(matrix @ (x + 0.05 * slope))
        return x

    return func, draw(4)


def attention(length: int, width: int, draw: Any) -> Made:
    """Self-attention of one sequence, one head."""
    projections = [draw(width, width) / width**0.5 for _ in range(3)]

    def func(x: Any) -> Any:
        query, key, value = (x @ p for p in projections)
        return torch.softmax(query @ key.T / width**0.5, -1) @ value

    return func, draw(length, width)


def image_to_image(side: int, channels: int, draw: Any) -> Made:
    """Two convolutions, an image in and an image out."""
    first, second = draw(channels, 1, 3, 3) / 3, draw(1, channels, 3, 3) / 3

    def func(x: Any) -> Any:
        hidden = F.relu(F.conv2d(x[None, None], first, padding=1))
        return F.conv2d(hidden, second, padding=1)[0, 0]

    return func, draw(side, side)


def classifier(side: int, draw: Any) -> Made:
    """A convolutional network, an image in and ten scores out."""
    first, second = draw(8, 1, 3, 3) / 3, draw(16, 8, 3, 3) / 8
    last = draw(10, 16 * (side // 4) ** 2) / side

    def func(x: Any) -> Any:
        hidden = F.max_pool2d(F.relu(F.conv2d(x[None, None], first, padding=1)), 2)
        return last @ F.max_pool2d(F.relu(F.conv2d(hidden, second, padding=1)), 2).flatten()

    return func, draw(side, side)


def energy(size: int, draw: Any, xp: Any = torch) -> Made:
    """Many numbers in, one out."""
    matrix = draw(64, size) / size**0.5
    return lambda x: xp.square(matrix @ x).sum() + xp.cos(x).sum(), draw(size)


def curve(size: int, draw: Any, xp: Any = torch) -> Made:
    """One number in, many out: a trajectory by its parameter."""
    times = draw(size)
    return lambda x: xp.sin(times * x) * xp.exp(-x * x), draw()


def arm(draw: Any, xp: Any = torch) -> Made:
    """Seven joints about alternating axes: where the hand is, and which way it points."""
    lengths = draw(7)

    def func(q: Any) -> Any:
        cos, sin = xp.cos(q), xp.sin(q)
        one, zero = cos[0] * 0 + 1, cos[0] * 0
        turned, place = [[one, zero, zero], [zero, one, zero], [zero, zero, one]], [zero] * 3
        for joint in range(7):
            a, b = (0, 1) if joint % 2 else (0, 2)  # the axes of the plane that it turns in
            for row in turned:
                row[a], row[b] = (
                    cos[joint] * row[a] + sin[joint] * row[b],
                    cos[joint] * row[b] - sin[joint] * row[a],
                )
            place = [p + lengths[joint] * row[2] for p, row in zip(place, turned, strict=True)]
        return xp.stack([*place, turned[0][2], turned[1][2], turned[2][2]])

    return func, draw(7)


def bodies(draw: Any, xp: Any = torch) -> Made:
    """What moves three bodies that attract each other: velocities, and accelerations."""
    masses = abs(draw(3))

    def func(state: Any) -> Any:
        places, speeds = state[:9].reshape(3, 3), state[9:]
        apart = places[None] - places[:, None]
        cubes = ((apart * apart).sum(-1) + 0.1) ** 1.5
        pull = (masses[:, None] * apart / cubes[..., None]).sum(1)
        return xp.concatenate([speeds, pull.reshape(9)])

    return func, draw(18)


def each(count: int, make: Any, draw: Any, *xp: Any) -> Made:
    """A function of one sample, at many of them."""
    func, x = make(draw, *xp)
    return func, draw(count, *x.shape)
