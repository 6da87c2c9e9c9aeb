"""The strategy grid: functions of every shape, which `auto` and `autotune` must choose well for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jacfunc
from benchmarks.problems import formulas
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
    setup: Callable[[torch.dtype, torch.device], Problem]

    def problem(self, device: torch.device) -> Problem:
        """The same numbers whenever it is asked."""
        return self.setup(self.dtype, device)


def of_function(make: Callable[[Any], tuple[Callable[..., Any], Tensor]]) -> Any:
    """A function of one tensor, given as ``make(draw) -> (func, x)``."""

    def setup(dtype: torch.dtype, device: torch.device) -> Problem:
        func, x = make(formulas.drawing(dtype, device))

        def derive(strategy: str | Strategy) -> Callable[[], Any]:
            compute = jacfunc.jacobian(func, strategy=strategy)
            return lambda: compute(x)

        return Problem(func(x).numel(), x.numel(), derive)

    return setup


def of_module(make: Callable[[], nn.Module], shape: tuple[int, ...], wrt: Any, batch: int) -> Any:
    """A module, per sample over a batch; with ``batch`` 0 as a whole, on one sample."""

    def setup(dtype: torch.dtype, device: torch.device) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make().to(device, dtype)
        x = formulas.drawing(dtype, device)(batch or 1, *shape)

        def derive(strategy: str | Strategy) -> Callable[[], Any]:
            compute = jacfunc.module_jacobian(module, wrt, per_sample=batch > 0, strategy=strategy)
            return lambda: compute(x)

        params = sum(param.numel() for param in module.parameters())
        return Problem(module(x)[0].numel(), params if wrt == "params" else x[0].numel(), derive)

    return setup


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
        yield f"mlp 64, {inputs} → {outputs}", partial(formulas.mlp, inputs, outputs, 64)
    for inputs, outputs in ((8, 8), (512, 8), (8, 512), (512, 512)):
        yield f"mlp 512, {inputs} → {outputs}", partial(formulas.mlp, inputs, outputs, 512)
    for size in (16, 256, 2048):
        yield f"stencil, {size} → {size}", partial(formulas.stencil, size)
    for side in (8, 32):
        yield f"heat, {side}² → {side}²", partial(formulas.heat, side)
    yield "orbit, 4 → 4, 20 steps", partial(formulas.orbit, 20)
    for length, width in ((4, 8), (16, 32)):
        size = length * width
        yield f"attention, {size} → {size}", partial(formulas.attention, length, width)
    yield "cnn, 16² → 16²", partial(formulas.image_to_image, 16, 4)
    yield "cnn, 16² → 10", partial(formulas.classifier, 16)
    yield "cnn, 32² → 10", partial(formulas.classifier, 32)
    yield "energy, 4096 → 1", partial(formulas.energy, 4096)
    yield "curve, 1 → 4096", partial(formulas.curve, 4096)


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
