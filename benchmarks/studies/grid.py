"""The strategy grid: functions of every shape, which `auto` and `autotune` must choose well for."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jacfunc
from benchmarks.problems import formulas
from jacfunc import Strategy
from jacfunc.compare import Problem

CHUNKS, MOST_LOOPS = (16, 128, 512), 256
Case = tuple[str, Callable[[torch.device], Problem]]
"""A name, and what makes the problem on a device, with the same numbers every time."""


def candidates(problem: Problem) -> dict[str, str | Strategy]:
    """The strategies that a careful person would try by hand."""
    (x,) = problem.args
    out, module = problem.target(x), problem.module
    if module is not None:
        out, x = out[0], x[0]
    rows, columns = out.numel(), x.numel()
    if module is not None and problem.by_params:
        columns = sum(param.numel() for param in module.parameters())
    ways: Any = (("reverse", jacfunc.Reverse, rows), ("forward", jacfunc.Forward, columns))
    strategies: dict[str, str | Strategy] = {}
    for name, make, total in ways:
        strategies[name] = make()
        strategies |= {f"{name} {size}": make(size) for size in CHUNKS if size < total}
    if rows <= MOST_LOOPS:
        strategies["looped rows"] = jacfunc.Looped("rows")
    if columns <= MOST_LOOPS:
        strategies["looped columns"] = jacfunc.Looped("columns")
    return strategies


def of_function(make: Callable[[Any], Any], dtype: torch.dtype, device: torch.device) -> Problem:
    """A function of one tensor, as ``make(draw) -> (func, x)``."""
    func, x = make(formulas.drawing(dtype, device))
    return Problem(func, (x,))


def of_module(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    wrt: Any,
    batch: int,
    device: torch.device,
) -> Problem:
    """A module, per sample over a batch; with ``batch`` 0 as a whole, on one sample."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().to(device)
    x = formulas.drawing(torch.float32, device)(batch or 1, *shape)
    return Problem(module, (x,), wrt=wrt, per_sample=batch > 0)


def mlp() -> nn.Module:
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    first = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10))


def decoder() -> nn.Module:
    """Few numbers in, an image out."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 256))


class Attention(nn.Module):
    """One block: attention and a residual, pooled to ten scores."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        query, key, value = self.project(self.norm(x)).chunk(3, -1)
        mixed = x + torch.softmax(query @ key.transpose(-1, -2) / 32**0.5, -1) @ value
        return self.head(mixed.mean(-2))


MLPS = {
    64: (
        (1, 1), (4, 4), (1, 64), (64, 1), (1, 4096), (4096, 1), (16, 256), (256, 16), (4, 1024),
        (1024, 4), (64, 64), (256, 256), (64, 1024), (1024, 64), (16, 4096), (4096, 16),
        (1024, 1024), (4096, 4096),
    ),
    512: ((8, 8), (512, 8), (8, 512), (512, 512)),
}  # fmt: skip
"""Inputs and outputs of perceptrons, by width."""

MODULES: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("mlp", mlp, (64,)),
    ("cnn", cnn, (1, 8, 8)),
    ("attention", Attention, (8, 32)),
    ("decoder", decoder, (4,)),
)


def _functions() -> Iterator[tuple[str, Any]]:
    for width, shapes in MLPS.items():
        for inputs, outputs in shapes:
            name = f"mlp {width}, {inputs} → {outputs}"
            yield name, partial(formulas.mlp, inputs, outputs, width)
    yield "stencil, 16 → 16", partial(formulas.stencil, 16)
    yield "stencil, 256 → 256", partial(formulas.stencil, 256)
    yield "stencil, 2048 → 2048", partial(formulas.stencil, 2048)
    yield "heat, 8² → 8²", partial(formulas.heat, 8)
    yield "heat, 32² → 32²", partial(formulas.heat, 32)
    yield "orbit, 4 → 4, 20 steps", partial(formulas.orbit, 20)
    yield "attention, 32 → 32", partial(formulas.attention, 4, 8)
    yield "attention, 512 → 512", partial(formulas.attention, 16, 32)
    yield "cnn, 16² → 16²", partial(formulas.image_to_image, 16, 4)
    yield "cnn, 16² → 10", partial(formulas.classifier, 16)
    yield "cnn, 32² → 10", partial(formulas.classifier, 32)
    yield "energy, 4096 → 1", partial(formulas.energy, 4096)
    yield "curve, 1 → 4096", partial(formulas.curve, 4096)


def cases() -> Iterator[Case]:
    """Names and problems: every function in both precisions, every module in single."""
    for name, make in _functions():
        for dtype in (torch.float32, torch.float64):
            yield f"{name}, {str(dtype)[-2:]} bit", partial(of_function, make, dtype)
    for batch in (0, 8, 32):
        how = f"B = {batch}" if batch else "whole"
        for name, module, shape in MODULES:
            for wrt in ("params", "inputs"):
                case = f"{name} module, {wrt}, {how}, 32 bit"
                yield case, partial(of_module, module, shape, wrt, batch)
