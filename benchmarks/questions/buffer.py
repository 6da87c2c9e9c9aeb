"""Flat per-sample Jacobians ``[B, C, P]`` into a buffer that is used again, and afresh."""

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.per_sample import BY_CONCATENATION, BY_RECIPE, RECIPE, by_jacfunc
from benchmarks.contestants.rivals import by_opacus
from benchmarks.problems.networks import CLASSES, LARGE, LENET, SHORT, WIDE, case, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

OURS, FILL = "jacfunc, out=", "fill_, warm"


def by_fill(problem: Problem) -> Run:
    """The bare write of as many numbers."""
    buffer = _buffer(problem)
    return lambda: buffer.fill_(1.0)


def into_buffer(problem: Problem, **options: Any) -> Run:
    return by_jacfunc(problem, flat=True, out=_buffer(problem), **options)


def _buffer(problem: Problem) -> Tensor:
    """A tensor of the shape of J."""
    model, images = parts(problem)
    parameters = sum(param.numel() for param in model.parameters())
    return images.new_empty(len(images), CLASSES, parameters)


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", partial(into_buffer, strategy="structured")),
    Contestant("jacfunc auto, out=", "jacfunc", into_buffer),
    Contestant("jacfunc, afresh", "jacfunc", partial(by_jacfunc, flat=True, strategy="structured")),
    Contestant(FILL, "bound", by_fill, answers=False),
    BY_RECIPE,
    BY_CONCATENATION,
    Contestant("Opacus", "rival", by_opacus),
)


def faster(network: str, bound: float, *others: Wanted) -> Case:
    """A case that wants jacfunc so many times faster than the recipe."""
    wanted = (Wanted(OURS, "times faster than", bound, (RECIPE,)), *others)
    return case(network, 64, CONTESTANTS, baseline=OURS, wanted=wanted)


QUESTION = Question(
    "buffer",
    "Per-sample Jacobians into a buffer that is used again: how near to the bare write?",
    OURS,
    (
        faster(LARGE, 5.0, Wanted(OURS, "time ÷", 1.3, (FILL,))),
        faster(LENET, 1.8),
        *(faster(network, 1.4) for network in ("transformer", SHORT, WIDE)),
    ),
)
