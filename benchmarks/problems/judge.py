"""The judge: derivatives by the plainest loop, in float64, without jacfunc or torch.func."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._measuring import WrongAnswerError
from jacfunc.compare import Problem

Func = Callable[[Any], Any]
# blocks ``[B, C, *param]`` by parameter name, ``{"input": [B, C, *image]}``, or others by name
Answer = dict[str, Tensor]
TOLERANCE = {torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest error of an answer, relative to the largest entry of its block."""


def rows(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """One ``autograd.grad`` an output, as in the answers of forums: a block a leaf."""
    entries, grad = out.flatten(), torch.autograd.grad
    grads = [grad(entries[i], leaves, retain_graph=True) for i in range(len(entries))]
    blocks = (torch.stack(column) for column in zip(*grads, strict=True))
    return [block.view(*out.shape, *block.shape[1:]) for block in blocks]


def looped(func: Func, x: Tensor) -> Tensor:
    """The Jacobian of a function of one tensor."""
    point = x.detach().requires_grad_()
    return rows(func(point), [point])[0]


def looped_twice(func: Func, x: Tensor) -> Tensor:
    """The Hessian: one ``autograd.grad`` an entry of the gradient."""
    grad = partial(torch.autograd.grad, create_graph=True)
    return looped(lambda point: grad(func(point), point)[0], x)


def in_double(problem: Problem) -> tuple[nn.Module, Tensor]:
    """A float64 copy of a network on the CPU, and its images."""
    assert problem.module is not None
    model = copy.deepcopy(problem.module).to("cpu", torch.float64)
    return model, problem.args[0].to("cpu", torch.float64)


def reference(problem: Problem) -> Answer:
    """The Jacobian of each sample of a network, block by block."""
    model, images = in_double(problem)
    params = dict(model.named_parameters())
    names = params if problem.by_params else ("input",)
    samples = []
    for image in images:
        point = image[None].requires_grad_()
        blocks = rows(model(point)[0], [*params.values()] if problem.by_params else [point])
        samples.append(blocks if problem.by_params else [blocks[0][:, 0]])
    # block by block: the blocks of samples and of the batch together would take twice the memory
    return {name: torch.stack([blocks.pop(0) for blocks in samples]) for name in names}


def check(answer: Any, expected: Answer, tolerance: float = TOLERANCE[torch.float32]) -> float:
    """The largest relative error of an answer: blocks by name, or one tensor ``[B, C, P]``."""
    if isinstance(answer, Tensor):
        answer = _split(answer, expected)
    if set(answer) != set(expected):
        raise WrongAnswerError(f"names {sorted(answer)} instead of {sorted(expected)}")
    errors = [_error(name, answer[name], block) for name, block in expected.items()]
    # a NaN fails the comparison too
    if not all(error <= tolerance for error in errors):
        raise WrongAnswerError(f"relative error {max(errors):.1e}")
    return max(errors)


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
        shapes = f"{tuple(block.shape)}, not {tuple(expected.shape)}"
        raise WrongAnswerError(f"{name} has shape {shapes}")
    difference = (block.detach().to("cpu", torch.float64) - expected).abs().max()
    return float(difference / expected.abs().max())
