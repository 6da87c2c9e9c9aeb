"""Laplacians of a batch: value, gradient and Laplacian carried forward, or traces of Hessians."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import jacfunc
from benchmarks.cases import Question, Wanted
from benchmarks.contestants.functions import case, plain
from benchmarks.problems.functions import DOUBLE, SINGLE, Function, FunctionAtPoints
from benchmarks.problems.judge import Func, looped_twice
from jacfunc._measuring import Contestant

OURS, TRACE, TWICE = "jacfunc laplacian", "trace of vmap(hessian)", "double backward by hand"
BATCH = 16
WIDE, NARROW = (768, 768, 512, 512), (64, 64, 64)


class Scalar(nn.Module):
    """The only output of each sample as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def network(inputs: int, widths: tuple[int, ...], draw: Any) -> tuple[Func, Tensor]:
    """A perceptron with one output for any number of samples, tanh; and a batch of points."""
    layers: list[nn.Module] = []
    for size, width in pairwise((inputs, *widths, 1)):
        layer = nn.Linear(size, width)
        layer.weight = nn.Parameter(draw(width, size) / size**0.5)
        layer.bias = nn.Parameter(draw(width) / size**0.5)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1], Scalar()).requires_grad_(False), draw(BATCH, inputs)


def by_trace(problem: FunctionAtPoints) -> Func:
    hessians = torch.vmap(torch.func.hessian(problem.func))
    return lambda x: hessians(x).diagonal(dim1=1, dim2=2).sum(-1)


def by_diagonal(problem: FunctionAtPoints) -> Func:
    diagonal = jacfunc.vmap(jacfunc.hessian_diagonal(problem.func))
    return lambda x: diagonal(x).sum(-1)


def by_hand(problem: FunctionAtPoints) -> Func:
    """Value, gradient and Laplacian through linear layers and tanh, of the whole batch."""
    model: Any = problem.func
    first, *others = [layer for layer in model if isinstance(layer, nn.Linear)]

    def compute(x: Tensor) -> Tensor:
        y, grads = first(x), first.weight.T[:, None]
        laplacian = torch.zeros_like(y)
        for layer in others:
            y = torch.tanh(y)
            slope = 1 - y * y
            laplacian = slope * (laplacian - 2 * y * grads.square().sum(0)) @ layer.weight.T
            y, grads = layer(y), (slope * grads) @ layer.weight.T
        return laplacian.squeeze(-1)

    return compute


def twice(problem: FunctionAtPoints) -> Func:
    """A backward pass of the whole batch, and one through it for each input."""

    def compute(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grads,) = torch.autograd.grad(problem.func(x).sum(), x, create_graph=True)
        seconds = torch.zeros(len(x)).to(x)
        for k in range(x.shape[1]):
            (column,) = torch.autograd.grad(grads[:, k].sum(), x, retain_graph=True)
            seconds += column[:, k]
        return seconds

    return compute


def expected(func: Func, x: Tensor) -> Tensor:
    """A trace a sample."""
    return torch.stack([looped_twice(func, point).trace() for point in x])


CONTESTANTS: tuple[Contestant[FunctionAtPoints], ...] = (
    plain(OURS, "jacfunc", lambda problem: jacfunc.vmap(jacfunc.laplacian(problem.func))),
    plain("jacfunc hessian_diagonal, summed", "jacfunc", by_diagonal),
    plain("forward Laplacian by hand", "autograd", by_hand),
    plain(TRACE, "torch.func", by_trace),
    plain(TWICE, "autograd", twice),
)
WANTED = (
    Wanted(OURS, "times faster than", 2.4, (TRACE,)),
    Wanted(OURS, "times faster than", 1.0, (TWICE,)),
    Wanted(OURS, "peak ÷", 0.41, (TRACE,)),
)
PROBLEMS = (
    ("mlp 768-768-512-512", 50, WIDE, SINGLE, WANTED),
    ("mlp 64-64-64", 50, NARROW, SINGLE, ()),
    ("mlp 64-64-64, of 3 inputs", 3, NARROW, SINGLE, ()),
    ("mlp 64-64-64", 50, NARROW, DOUBLE, ()),
)

QUESTION = Question(
    "laplacian",
    "Laplacians of a batch: carried forward, or traces of Hessians?",
    OURS,
    tuple(
        case(
            name,
            Function(partial(network, inputs, widths)),
            {"inputs": inputs, "batch": BATCH},
            dtype,
            CONTESTANTS,
            TRACE,
            expected,
            wanted=wanted,
        )
        for name, inputs, widths, dtype, wanted in PROBLEMS
    ),
)
