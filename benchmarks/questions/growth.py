"""How the time of an NTK grows with samples, parameters and classes, beside the counted work."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call, jvp

from benchmarks.cases import ANSWER, Case, Question
from benchmarks.problems.judge import Answer, check
from benchmarks.problems.networks import PIXELS, Problem
from benchmarks.questions import ntk as kernels
from jacfunc._measuring.rounds import Check, Contestant, Effort

EFFORT = Effort(rounds=10, seconds=1.5, fewest=3, patience=10.0)
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

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"batch": self.batch, "parameters": self.parameters, "classes": self.classes}
        # of J, which the answer is compared with
        return sizes | {ANSWER: math.prod(sizes.values()) * torch.float32.itemsize}

    def problem(self, device: torch.device) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second, last = (nn.Linear(*sizes) for sizes in self.layers)
            images = torch.randn(self.batch, 1, PIXELS, PIXELS)
        model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
        return Problem(model.to(device), images.to(device))


def by_factors(point: Point) -> float:
    """A forward pass, a pullback a class, and two Gram matrices a layer: in the limit B², P, C².

    Nothing is pulled back through the first layer: its factor is what comes back to it.
    """
    rows = point.batch * point.classes
    inputs, outputs = point.layers[0]
    sweeps = 2 * ((point.batch + rows) * point.parameters - rows * (inputs + 1) * outputs)
    grams = sum(point.batch**2 * inputs + rows**2 * outputs for inputs, outputs in point.layers)
    return sweeps + 2 * grams


def by_rows(point: Point) -> float:
    """The same sweeps, J, and its product with itself: in the limit B², P, C²."""
    rows = point.batch * point.classes
    return 2 * (point.batch + 2 * rows + rows**2) * point.parameters


def judge(problem: Problem) -> Check:
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
    expected = {kernels.KERNEL: pushed[1].detach()}
    return partial(_error, vector, expected)


def _error(vector: torch.Tensor, expected: Answer, answer: Answer) -> float:
    kernel = answer[kernels.KERNEL].detach().to("cpu", torch.float64)
    return check({kernels.KERNEL: torch.einsum("nmab,mb->na", kernel, vector)}, expected)


def _contestants(point: Point, through_j: bool) -> tuple[Contestant[Problem], ...]:
    ours = Contestant(kernels.OURS, "jacfunc", kernels.by_jacfunc, work=lambda _: by_factors(point))
    recipe = Contestant(
        kernels.MATMUL, "torch.func", kernels.by_matmul, work=lambda _: by_rows(point)
    )
    return (ours, recipe) if through_j else (ours,)


def _along(axis: str, letter: str, points: Sequence[Point], through_j: int) -> list[Case]:
    """A case a point; of the first ones also through J, which later would take minutes."""
    return [
        Case(
            name=f"{letter} = {point.sizes[axis]:,}",
            setup=point.problem,
            contestants=_contestants(point, number < through_j),
            check=judge,
            baseline=kernels.OURS,
            sizes=point.sizes,
            axis=axis,
            effort=EFFORT,
        )
        for number, point in enumerate(points)
    ]


QUESTION = Question(
    "ntk-growth",
    "How does the time of an NTK grow with samples, parameters and classes?",
    kernels.OURS,
    (
        *_along("batch", "B", [Point(batch=2**n) for n in range(3, 10)], through_j=4),
        *_along("parameters", "P", [Point(width=2**n) for n in range(6, 12)], through_j=4),
        *_along("classes", "C", [Point(classes=2**n) for n in range(1, 7)], through_j=4),
    ),
)
