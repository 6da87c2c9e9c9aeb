"""The strategy grid: functions of every shape, which `auto` and `autotune` must choose well for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc
from jacfunc import Strategy

CHUNKS = (16, 128, 512)
MOST_LOOPS = 256


@dataclass(frozen=True)
class Problem:
    """A case set up: ``derive(strategy)`` is a call that takes the Jacobian by it."""

    rows: int
    columns: int
    derive: Callable[[str | Strategy], Callable[[], Any]]

    def candidates(self) -> dict[str, str | Strategy]:
        """What a careful person would try by hand."""
        found: dict[str, str | Strategy] = {}
        for name, make, total in (
            ("reverse", jacfunc.Reverse, self.rows),
            ("forward", jacfunc.Forward, self.columns),
        ):
            found[name] = make()
            found |= {f"{name} {size}": make(size) for size in CHUNKS if size < total}
        if self.rows <= MOST_LOOPS:
            found["looped rows"] = jacfunc.Looped("rows")
        if self.columns <= MOST_LOOPS:
            found["looped columns"] = jacfunc.Looped("columns")
        return found


@dataclass(frozen=True)
class Case:
    """One Jacobian: a row of the regret table."""

    name: str
    dtype: torch.dtype
    setup: Callable[[torch.Generator, torch.device, torch.dtype], Problem]

    def problem(self, device: torch.device) -> Problem:
        """The same numbers whenever it is asked."""
        return self.setup(torch.Generator().manual_seed(0), device, self.dtype)


def numbers(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Any:
    """``draw(*shape)``: normal numbers, the same in every dtype but for their rounding."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(size=shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def of_function(make: Callable[[Any], tuple[Callable[..., Any], Tensor]]) -> Any:
    """A function of one tensor, given as ``make(draw) -> (func, x)``."""

    def setup(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        func, x = make(numbers(generator, device, dtype))

        def derive(strategy: str | Strategy) -> Callable[[], Any]:
            compute = jacfunc.jacobian(func, strategy=strategy)
            return lambda: compute(x)

        return Problem(func(x).numel(), x.numel(), derive)

    return setup


def of_module(make: Callable[[], nn.Module], shape: tuple[int, ...], wrt: Any, batch: int) -> Any:
    """A module, per sample over a batch; with ``batch`` 0 as a whole, on one sample."""

    def setup(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make().to(device, dtype)
        x = numbers(generator, device, dtype)(batch or 1, *shape)

        def derive(strategy: str | Strategy) -> Callable[[], Any]:
            compute = jacfunc.module_jacobian(module, wrt, per_sample=batch > 0, strategy=strategy)
            return lambda: compute(x)

        params = sum(param.numel() for param in module.parameters())
        return Problem(module(x)[0].numel(), params if wrt == "params" else x[0].numel(), derive)

    return setup


# --- functions of one tensor; those with ``xp`` can be had in JAX's words, too ---


def mlp(
    inputs: int, outputs: int, width: int, draw: Any, xp: Any = torch
) -> tuple[Callable[..., Any], Tensor]:
    """Inputs - width - width - outputs, tanh."""
    first, second, last = mlp_weights(inputs, outputs, width, draw)
    return lambda x: last @ xp.tanh(second @ xp.tanh(first @ x)), draw(inputs)


def mlp_weights(inputs: int, outputs: int, width: int, draw: Any) -> list[Tensor]:
    return [draw(b, a) / a**0.5 for a, b in pairwise((inputs, width, width, outputs))]


def stencil(size: int, draw: Any) -> tuple[Callable[..., Any], Tensor]:
    """Reaction and diffusion in one dimension, Python numbers among its factors."""

    def func(u: Tensor) -> Tensor:
        padded = F.pad(u, (1, 1))
        return 0.1 * (padded[2:] - 2 * u + padded[:-2]) + u * (1 - u) * 0.5

    return func, draw(size)


def heat(side: int, draw: Any) -> tuple[Callable[..., Any], Tensor]:
    """The five points of a Laplacian in two dimensions, by convolution, and a nonlinearity."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)

    def func(u: Tensor) -> Tensor:
        spread: Tensor = F.conv2d(u[None, None], kernel.to(u), padding=1)[0, 0]
        return spread + torch.sin(u)

    return func, draw(side, side)


def orbit(steps: int, draw: Any, xp: Any = torch) -> tuple[Callable[..., Any], Tensor]:
    """Runge–Kutta steps of a small system: many operations on few numbers."""
    matrix = draw(4, 4) / 4

    def slope(x: Tensor) -> Tensor:
        speed: Tensor = xp.tanh(matrix @ x)
        return speed

    def func(x: Tensor) -> Tensor:
        for _ in range(steps):
            one = slope(x)
            two = slope(x + 0.05 * one)
            x = x + 0.1 * two
        return x

    return func, draw(4)


def attention(length: int, width: int, draw: Any) -> tuple[Callable[..., Any], Tensor]:
    """Self-attention of one sequence, one head."""
    projections = [draw(width, width) / width**0.5 for _ in range(3)]

    def func(x: Tensor) -> Tensor:
        query, key, value = (x @ p for p in projections)
        mixed: Tensor = torch.softmax(query @ key.T / width**0.5, -1) @ value
        return mixed

    return func, draw(length, width)


def image_to_image(side: int, channels: int, draw: Any) -> tuple[Callable[..., Any], Tensor]:
    """Two convolutions, an image in and an image out."""
    first, second = draw(channels, 1, 3, 3) / 3, draw(1, channels, 3, 3) / 3

    def func(x: Tensor) -> Tensor:
        hidden = F.relu(F.conv2d(x[None, None], first, padding=1))
        image: Tensor = F.conv2d(hidden, second, padding=1)[0, 0]
        return image

    return func, draw(side, side)


def classifier(side: int, draw: Any) -> tuple[Callable[..., Any], Tensor]:
    """A convolutional network, an image in and ten scores out."""
    first, second = draw(8, 1, 3, 3) / 3, draw(16, 8, 3, 3) / 8
    last = draw(10, 16 * (side // 4) ** 2) / side

    def func(x: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(F.conv2d(x[None, None], first, padding=1)), 2)
        hidden = F.max_pool2d(F.relu(F.conv2d(hidden, second, padding=1)), 2)
        scores: Tensor = last @ hidden.flatten()
        return scores

    return func, draw(side, side)


def energy(size: int, draw: Any, xp: Any = torch) -> tuple[Callable[..., Any], Tensor]:
    """Many numbers in, one out."""
    matrix = draw(64, size) / size**0.5
    return lambda x: xp.square(matrix @ x).sum() + xp.cos(x).sum(), draw(size)


def curve(size: int, draw: Any, xp: Any = torch) -> tuple[Callable[..., Any], Tensor]:
    """One number in, many out: a trajectory by its parameter."""
    times = draw(size)
    return lambda x: xp.sin(times * x) * xp.exp(-x * x), draw()


# --- modules ---


def mlp_module() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def cnn_module() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def decoder_module() -> nn.Module:
    """Few numbers in, an image out."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 256))


class Attention(nn.Module):
    """One block: attention and a residual, pooled to ten scores."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).chunk(3, -1)
        mixed = x + torch.softmax(query @ key.transpose(-1, -2) / 32**0.5, -1) @ value
        scores: Tensor = self.head(mixed.mean(-2))
        return scores


MLP_SIZES = (
    (1, 1), (4, 4), (1, 64), (64, 1), (1, 4096), (4096, 1), (16, 256), (256, 16), (4, 1024),
    (1024, 4), (64, 64), (256, 256), (64, 1024), (1024, 64), (16, 4096), (4096, 16), (1024, 1024),
    (4096, 4096),
)  # fmt: skip


def _functions() -> Iterator[tuple[str, Any]]:
    for inputs, outputs in MLP_SIZES:
        yield f"mlp 64, {inputs} → {outputs}", partial(mlp, inputs, outputs, 64)
    for inputs, outputs in ((8, 8), (512, 8), (8, 512), (512, 512)):
        yield f"mlp 512, {inputs} → {outputs}", partial(mlp, inputs, outputs, 512)
    for size in (16, 256, 2048):
        yield f"stencil, {size} → {size}", partial(stencil, size)
    for side in (8, 32):
        yield f"heat, {side}² → {side}²", partial(heat, side)
    yield "orbit, 4 → 4, 20 steps", partial(orbit, 20)
    for length, width in ((4, 8), (16, 32)):
        size = length * width
        yield f"attention, {size} → {size}", partial(attention, length, width)
    yield "cnn, 16² → 16²", partial(image_to_image, 16, 4)
    yield "cnn, 16² → 10", partial(classifier, 16)
    yield "cnn, 32² → 10", partial(classifier, 32)
    yield "energy, 4096 → 1", partial(energy, 4096)
    yield "curve, 1 → 4096", partial(curve, 4096)


def _modules() -> Iterator[tuple[str, Any]]:
    for batch in (0, 8, 32):
        how = f"B = {batch}" if batch else "whole"
        for name, make, shape in (
            ("mlp", mlp_module, (64,)),
            ("cnn", cnn_module, (1, 8, 8)),
            ("attention", Attention, (8, 32)),
            ("decoder", decoder_module, (4,)),
        ):
            for wrt in ("params", "inputs"):
                yield f"{name} module, {wrt}, {how}", of_module(make, shape, wrt, batch)


def cases() -> Iterator[Case]:
    """Every function in both precisions, every module in single."""
    for name, make in _functions():
        for dtype in (torch.float32, torch.float64):
            yield Case(f"{name}, {str(dtype)[-2:]} bit", dtype, of_function(make))
    for name, setup in _modules():
        yield Case(f"{name}, 32 bit", torch.float32, setup)
