"""The judge: Jacobians by the plainest loop there is, in float64, without jacfunc or torch.func."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.workloads import Answer, Problem

TOLERANCE = 1e-4
"""Largest error of a float32 answer, relative to the largest entry of its block."""


class WrongAnswerError(Exception):
    """The answer has other names, shapes or numbers than the reference."""


def reference(problem: Problem) -> Answer:
    """One ``autograd.grad`` a sample and class, on a float64 copy of the model on the CPU."""
    model = copy.deepcopy(problem.model).to("cpu", torch.float64)
    params = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {}
    for image in problem.images.to("cpu", torch.float64):
        point = image[None].requires_grad_()
        targets = params if problem.wrt == "params" else {"input": point}
        for score in model(point)[0]:
            grads = torch.autograd.grad(score, list(targets.values()), retain_graph=True)
            for name, grad in zip(targets, grads, strict=True):
                rows.setdefault(name, []).append(grad if problem.wrt == "params" else grad[0])
    batch = len(problem.images)
    return {name: torch.stack(grads).unflatten(0, (batch, -1)) for name, grads in rows.items()}


def check(answer: Answer, expected: Answer) -> float:
    """The largest relative error of an answer.

    Raises:
        WrongAnswerError: the error is above :data:`TOLERANCE`, or names or shapes differ.
    """
    if set(answer) != set(expected):
        raise WrongAnswerError(f"names {sorted(answer)} instead of {sorted(expected)}")
    errors = [_error(name, answer[name], block) for name, block in expected.items()]
    worst = max(errors)
    # a NaN fails the comparison too
    if not all(error <= TOLERANCE for error in errors):
        raise WrongAnswerError(f"relative error {worst:.1e}")
    return worst


def _error(name: str, block: Tensor, expected: Tensor) -> float:
    if block.shape != expected.shape:
        raise WrongAnswerError(
            f"{name} has shape {tuple(block.shape)}, not {tuple(expected.shape)}"
        )
    difference = (block.detach().to("cpu", torch.float64) - expected).abs().max()
    return float(difference / expected.abs().max())
