"""How the time of an NTK grows with samples, parameters and classes, beside the counted work."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from benchmarks.cases import ANSWER, Case, Question
from benchmarks.contestants.by_hand import KERNEL
from benchmarks.contestants.kernels import MATMUL, OURS, by_jacfunc, by_matmul
from benchmarks.problems.judge import Answer, check, in_double
from benchmarks.problems.networks import PIXELS, perceptron
from jacfunc._measuring import Check, Contestant, Effort
from jacfunc.compare import Problem

EFFORT = Effort(rounds=10, seconds=1.5, fewest=3, patience=10.0)
THROUGH_J = 4  # of each axis so many points are taken through J, too; later ones would take minutes


@dataclass(frozen=True)
class Point:
    """A batch through a perceptron, ``784 - width - width - classes``; the axes meet in one."""

    batch: int = 32
    width: int = 256
    classes: int = 10

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
            model = perceptron(self.width, self.width, self.classes).to(device)
            images = torch.randn(self.batch, 1, PIXELS, PIXELS)
        return Problem(model, (images.to(device),))


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
    """Operations of as many sweeps, J, and its product with itself: in the limit B², P, C²."""
    rows = point.batch * point.classes
    return 2 * (point.batch + 2 * rows + rows**2) * point.parameters


def judge(problem: Problem) -> Check:
    """One product with the kernel beside ``J (Jᵀ v)`` in float64: cheap at every size."""
    model, images = in_double(problem)
    params = dict(model.named_parameters())
    scores = model(images)
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(scores.shape, dtype=torch.float64, generator=generator)
    pulled = torch.autograd.grad(scores, list(params.values()), vector)
    tangents = dict(zip(params, pulled, strict=True))
    pushed = jvp(lambda point: functional_call(model, point, (images,)), (params,), (tangents,))
    return partial(_error, vector, {KERNEL: pushed[1].detach()})


def _error(vector: Tensor, expected: Answer, answer: Answer) -> float:
    kernel = answer[KERNEL].detach().to("cpu", torch.float64)
    return check({KERNEL: torch.einsum("nmab,mb->na", kernel, vector)}, expected)


def _along(axis: str, letter: str, points: Sequence[Point]) -> Iterator[Case]:
    """A case a point."""
    for number, point in enumerate(points):
        factors, rows = by_factors(point), by_rows(point)
        ours = Contestant(OURS, "jacfunc", by_jacfunc, work=partial(_work, factors))
        recipe = Contestant(MATMUL, "torch.func", by_matmul, work=partial(_work, rows))
        both, name = (ours, recipe), f"{letter} = {point.sizes[axis]:,}"
        some, sizes = both if number < THROUGH_J else both[:1], point.sizes
        yield Case(name, point.problem, some, judge, OURS, "float32", sizes, axis, EFFORT)


def _work(operations: float, problem: Problem) -> float:
    return operations


QUESTION = Question(
    "ntk-growth",
    "How does the time of an NTK grow with samples, parameters and classes?",
    OURS,
    (
        *_along("batch", "B", [Point(batch=2**n) for n in range(3, 10)]),
        *_along("parameters", "P", [Point(width=2**n) for n in range(6, 12)]),
        *_along("classes", "C", [Point(classes=2**n) for n in range(1, 7)]),
    ),
)
