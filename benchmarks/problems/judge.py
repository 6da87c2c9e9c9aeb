"""The judge: Jacobians by the plainest loop there is, in float64, without jacfunc or torch.func."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problems.networks import Problem, Wrt, noisy, sizes
from jacfunc._measuring.results import WrongAnswerError
from jacfunc._measuring.rounds import Check, Contestant

Answer = dict[str, Tensor]
"""Blocks ``[B, C, *param]`` by parameter name, or ``{"input": [B, C, *image]}``."""

TOLERANCE = 1e-4
"""Largest error of a float32 answer, relative to the largest entry of its block."""


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
    # block by block: the rows and the blocks together would take twice the memory
    return {name: torch.stack(rows.pop(name)).unflatten(0, (batch, -1)) for name in list(rows)}


def case_of(
    network: str,
    batch: int,
    contestants: tuple[Contestant[Problem], ...],
    expected: Callable[[Problem], Answer] = reference,
    wrt: Wrt = "params",
    **more: Any,
) -> Case:
    """A network at one batch size, judged by what is ``expected``."""

    def judge(problem: Problem) -> Check:
        return partial(check, expected=expected(problem))

    return Case(
        name=f"{network}, B={batch}",
        setup=partial(noisy, network, batch, wrt),
        contestants=contestants,
        check=judge,
        sizes=sizes(network, batch, wrt),
        **more,
    )


def check(answer: Any, expected: Answer) -> float:
    """The largest relative error of an answer: blocks by name, or one tensor ``[B, C, P]``.

    Raises:
        WrongAnswerError: the error is above :data:`TOLERANCE`, or names or shapes differ.
    """
    if isinstance(answer, Tensor):
        answer = _split(answer, expected)
    if set(answer) != set(expected):
        raise WrongAnswerError(f"names {sorted(answer)} instead of {sorted(expected)}")
    errors = [_error(name, answer[name], block) for name, block in expected.items()]
    worst = max(errors)
    # a NaN fails the comparison too
    if not all(error <= TOLERANCE for error in errors):
        raise WrongAnswerError(f"relative error {worst:.1e}")
    return worst


def _split(flat: Tensor, expected: Answer) -> Answer:
    """Views of the last dimension by name."""
    lengths = [block[0, 0].numel() for block in expected.values()]
    shape = (*next(iter(expected.values())).shape[:2], sum(lengths))
    if flat.shape != shape:
        raise WrongAnswerError(f"it has shape {tuple(flat.shape)}, not {shape}")
    pieces = zip(expected.items(), flat.split(lengths, -1), strict=True)
    return {name: piece.unflatten(-1, block.shape[2:]) for (name, block), piece in pieces}


def _error(name: str, block: Tensor, expected: Tensor) -> float:
    if block.shape != expected.shape:
        raise WrongAnswerError(
            f"{name} has shape {tuple(block.shape)}, not {tuple(expected.shape)}"
        )
    difference = (block.detach().to("cpu", torch.float64) - expected).abs().max()
    return float(difference / expected.abs().max())
