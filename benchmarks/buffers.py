"""Flat per-sample Jacobians ``[B, C, P]`` into a buffer that is used again, and afresh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import jacfunc
from benchmarks import rivals
from benchmarks.contestants import Contestant, Run
from benchmarks.reference import reference
from benchmarks.workloads import Answer, Problem

OURS, FILL = "jacfunc, out=", "fill_, warm"
RECIPE, CONCATENATED = rivals.RECIPE, rivals.CONCATENATED

expected = reference


def by_fill(problem: Problem) -> Run:
    """The bare write of as many numbers."""
    buffer = _buffer(problem)
    return lambda: {"": buffer.fill_(1.0)}


def by_jacfunc(problem: Problem) -> Run:
    return _into(problem, strategy="structured")


def by_planner(problem: Problem) -> Run:
    return _into(problem)


def by_jacfunc_afresh(problem: Problem) -> Run:
    derive = jacfunc.module_jacobian(
        problem.model, per_sample=True, flat=True, strategy="structured"
    )
    return lambda: named(derive(problem.images), problem.model)


def by_concatenation(problem: Problem) -> Run:
    flat = rivals.by_recipe_and_concatenation(problem)
    return lambda: named(flat(), problem.model)


def by_opacus(problem: Problem) -> Run:
    """On a copy of the model: the hooks stay."""
    return rivals.by_opacus(Problem(copy.deepcopy(problem.model), problem.images, problem.wrt))


def named(flat: Tensor, model: nn.Module) -> Answer:
    """Views of the last dimension by parameter."""
    params = dict(model.named_parameters())
    pieces = flat.split([param.numel() for param in params.values()], -1)
    return {
        name: piece.unflatten(-1, param.shape)
        for (name, param), piece in zip(params.items(), pieces, strict=True)
    }


def _into(problem: Problem, **options: Any) -> Run:
    model, buffer = problem.model, _buffer(problem)
    derive: Callable[[Tensor], Tensor] = jacfunc.module_jacobian(
        model, per_sample=True, flat=True, out=buffer, **options
    )
    return lambda: named(derive(problem.images), model)


def _buffer(problem: Problem) -> Tensor:
    """Of the shape of J."""
    parameters = sum(param.numel() for param in problem.model.parameters())
    with torch.no_grad():
        scores: Tensor = problem.model(problem.images)
    return scores.new_empty(*scores.shape, parameters)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant("jacfunc auto, out=", "jacfunc", by_planner),
    Contestant("jacfunc, afresh", "jacfunc", by_jacfunc_afresh),
    Contestant(FILL, "bound", by_fill, answers=False),
    Contestant(RECIPE, "torch.func", rivals.by_recipe),
    Contestant(CONCATENATED, "torch.func", by_concatenation),
    Contestant("Opacus", "rival", by_opacus),
)
