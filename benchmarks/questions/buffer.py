"""Flat per-sample Jacobians ``[B, C, P]`` into a buffer that is used again, and afresh."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.func import jacrev

import jacfunc
from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.per_sample import by_recipe, by_recipe_and_concatenation
from benchmarks.contestants.rivals import by_opacus
from benchmarks.problems.judge import case_of
from benchmarks.problems.networks import CLASSES, LARGE, LENET, SHORT, WIDE, Problem
from jacfunc._measuring.clock import Run
from jacfunc._measuring.rounds import Contestant

OURS, FILL, RECIPE = "jacfunc, out=", "fill_, warm", "vmap(jacrev)"
BATCH = 64


def by_fill(problem: Problem) -> Run:
    """The bare write of as many numbers."""
    buffer = _buffer(problem)
    return lambda: buffer.fill_(1.0)


def into_buffer(problem: Problem, **options: Any) -> Run:
    return afresh(problem, out=_buffer(problem), **options)


def afresh(problem: Problem, **options: Any) -> Run:
    derive = jacfunc.module_jacobian(problem.model, per_sample=True, flat=True, **options)
    return lambda: derive(problem.images)


def _buffer(problem: Problem) -> Tensor:
    """Of the shape of J."""
    parameters = sum(param.numel() for param in problem.model.parameters())
    return problem.images.new_empty(len(problem.images), CLASSES, parameters)


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", partial(into_buffer, strategy="structured")),
    Contestant("jacfunc auto, out=", "jacfunc", into_buffer),
    Contestant("jacfunc, afresh", "jacfunc", partial(afresh, strategy="structured")),
    Contestant(FILL, "bound", by_fill, answers=False),
    Contestant(RECIPE, "torch.func", partial(by_recipe, jacrev)),
    Contestant("vmap(jacrev) + cat", "torch.func", by_recipe_and_concatenation),
    Contestant("Opacus", "rival", by_opacus),
)


def _case(network: str, faster: float, *more: Wanted) -> Case:
    """As many times faster than the recipe as is wanted."""
    wanted = (Wanted(OURS, "times faster than", faster, (RECIPE,)), *more)
    return case_of(network, BATCH, CONTESTANTS, baseline=OURS, wanted=wanted)


QUESTION = Question(
    "buffer",
    "Per-sample Jacobians into a buffer that is used again: how near to the bare write?",
    OURS,
    (
        _case(LARGE, 5.0, Wanted(OURS, "time ÷", 1.3, (FILL,))),
        _case(LENET, 1.8),
        _case("transformer", 1.4),
        _case(SHORT, 1.4),
        _case(WIDE, 1.4),
    ),
)
