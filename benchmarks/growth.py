"""How the time of an NTK grows with samples, parameters and classes, beside the counted work."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jvp

from benchmarks import kernels
from benchmarks.contestants import Run
from benchmarks.measuring import interleaved
from benchmarks.networks import PIXELS
from benchmarks.reference import check
from benchmarks.workloads import Problem

ROUNDS = 3
BATCH, WIDTH, CLASSES = 32, 256, 10
"""Of the point through which all axes go."""


@dataclass(frozen=True)
class Point:
    """A batch through a perceptron of two hidden layers, ``784 - width - width - classes``."""

    batch: int = BATCH
    width: int = WIDTH
    classes: int = CLASSES

    @property
    def layers(self) -> list[tuple[int, int]]:
        return list(pairwise((PIXELS**2, self.width, self.width, self.classes)))

    @property
    def parameters(self) -> int:
        return sum((inputs + 1) * outputs for inputs, outputs in self.layers)

    def problem(self, device: torch.device) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second, last = (nn.Linear(*sizes) for sizes in self.layers)
            images = torch.randn(self.batch, 1, PIXELS, PIXELS)
        model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
        return Problem(model.to(device), images.to(device), "params")


@dataclass(frozen=True)
class Way:
    """``work`` counts the floating-point operations that theory knows of."""

    name: str
    prepare: Callable[[Problem], Run]
    work: Callable[[Point], float]


@dataclass(frozen=True)
class Axis:
    """``size`` names what grows, and each way has its own points along it."""

    symbol: str
    size: Callable[[Point], int]
    points: tuple[tuple[Point, ...], ...]

    @property
    def name(self) -> str:
        return f"growth in {self.symbol}"


@dataclass(frozen=True)
class Curve:
    """One way along one axis: medians in seconds, counted operations, the slope of each."""

    axis: str
    way: str
    sizes: list[int]
    seconds: list[float]
    work: list[float]
    exponent: float
    theory: float
    asymptote: float


def by_factors(point: Point) -> float:
    """A forward pass, a pullback a class, and two Gram matrices a layer."""
    rows = point.batch * point.classes
    sweeps = 2 * (point.batch + rows) * point.parameters
    grams = sum(point.batch**2 * inputs + rows**2 * outputs for inputs, outputs in point.layers)
    return sweeps + 2 * grams


def by_rows(point: Point) -> float:
    """The same sweeps, J, and its product with itself."""
    rows = point.batch * point.classes
    return 2 * (point.batch + 2 * rows + rows**2) * point.parameters


WAYS = (
    Way(kernels.OURS, kernels.by_jacfunc, by_factors),
    Way(kernels.MATMUL, kernels.by_matmul, by_rows),
)
ASYMPTOTES = {"B": (2.0, 2.0), "P": (1.0, 1.0), "C": (2.0, 2.0)}
"""Exponents of :data:`WAYS` in the limit: the factors pay for P in the sweeps alone."""

AXES = (
    Axis(
        "B",
        lambda point: point.batch,
        (
            tuple(Point(batch=batch) for batch in (32, 64, 128, 256, 512)),
            tuple(Point(batch=batch) for batch in (8, 16, 32, 64)),
        ),
    ),
    Axis(
        "P",
        lambda point: point.parameters,
        (
            tuple(Point(width=width) for width in (128, 256, 512, 1024, 2048)),
            tuple(Point(width=width) for width in (64, 128, 256, 512)),
        ),
    ),
    Axis(
        "C",
        lambda point: point.classes,
        (
            tuple(Point(classes=classes) for classes in (4, 8, 16, 32, 64)),
            tuple(Point(classes=classes) for classes in (2, 4, 8, 16)),
        ),
    ),
)


def measure(axis: Axis, device: torch.device) -> list[Curve]:
    """Every size of both ways along one axis, in interleaved rounds."""
    runs: dict[tuple[int, Point], Run] = {}
    for number, points in enumerate(axis.points):
        for point in points:
            problem = point.problem(device)
            runs[number, point] = WAYS[number].prepare(problem)
            _check(runs[number, point]()[kernels.KERNEL], problem)
    times = interleaved(runs, ROUNDS, device.type == "cuda")
    return [
        _curve(axis, number, [statistics.median(times[number, point]) for point in points])
        for number, points in enumerate(axis.points)
    ]


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent of the power law nearest to the values, by least squares on log axes."""
    logarithms = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(*logarithms).slope


def _curve(axis: Axis, number: int, seconds: list[float]) -> Curve:
    way, points = WAYS[number], axis.points[number]
    sizes, work = [axis.size(point) for point in points], [way.work(point) for point in points]
    return Curve(
        axis.symbol,
        way.name,
        sizes,
        seconds,
        work,
        slope(sizes, seconds),
        slope(sizes, work),
        ASYMPTOTES[axis.symbol][number],
    )


def _check(kernel: Tensor, problem: Problem) -> None:
    """One product with the kernel beside ``J (Jᵀ v)`` in float64: cheap at every size."""
    model = copy.deepcopy(problem.model).to("cpu", torch.float64)
    images = problem.images.to("cpu", torch.float64)
    params = dict(model.named_parameters())
    scores = model(images)
    vector = torch.randn(
        scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    pulled = torch.autograd.grad(scores, list(params.values()), vector)
    tangents = dict(zip(params, pulled, strict=True))
    pushed = jvp(lambda point: functional_call(model, point, (images,)), (params,), (tangents,))
    found = torch.einsum("nmab,mb->na", kernel.detach().to("cpu", torch.float64), vector)
    check({kernels.KERNEL: found}, {kernels.KERNEL: pushed[1].detach()})


def table(curves: list[Curve]) -> Table:
    """Fitted exponents beside those of the counted work over the same sizes, and in the limit."""
    shown = Table(
        title="Growth of an NTK's time",
        caption=f"Around B={BATCH}, width {WIDTH}, C={CLASSES}; medians of {ROUNDS} rounds.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("in", "way", "sizes", "ms", "exponent", "counted", "limit"):
        shown.add_column(heading, justify="left" if heading in ("in", "way") else "right")
    for curve in curves:
        ends = (f"{value * 1e3:.3g}" for value in (curve.seconds[0], curve.seconds[-1]))
        shown.add_row(
            curve.axis,
            curve.way,
            f"{curve.sizes[0]:,}–{curve.sizes[-1]:,}",
            "–".join(ends),
            *(f"{value:.2f}" for value in (curve.exponent, curve.theory, curve.asymptote)),
        )
    return shown
