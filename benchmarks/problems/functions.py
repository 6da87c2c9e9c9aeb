"""Functions of one tensor as problems: made from the same numbers in every dtype, and judged."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import jacfunc
from benchmarks.problems import formulas
from benchmarks.problems.formulas import CPU, drawing
from benchmarks.problems.judge import TOLERANCE, Answer, Func, check
from jacfunc._measuring import Check

SINGLE, DOUBLE = torch.float32, torch.float64


@dataclass(frozen=True)
class Function:
    """How a function of one tensor and a point are made from numbers, as ``draw(*shape)``."""

    make: Callable[[Any], tuple[Func, Tensor]]
    batched: Callable[[Any], Func] | None = None  # the function of many points, the batch in front
    in_jax: Callable[[Any, Any], tuple[Func, Any]] | None = None  # made with ``jax.numpy``


@dataclass(frozen=True, eq=False)
class FunctionAtPoints:
    """A function on a device, and the points that one run takes its derivative at in turn."""

    function: Function
    func: Func
    points: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """The point whose derivative is the answer."""
        return self.points[-1]

    @cached_property
    def costs(self) -> jacfunc.Estimate:
        """What jacfunc says beforehand of every strategy."""
        return jacfunc.estimate(self.func, self.x)


def set_up(
    function: Function, dtype: torch.dtype, calls: int, device: torch.device
) -> FunctionAtPoints:
    """A function at as many points as there are calls, with the same numbers every time."""
    draw = drawing(dtype, device)
    func, x = function.make(draw)
    return FunctionAtPoints(function, func, (x, *(draw(*x.shape) for _ in range(calls - 1))))


def judging(derivative: Callable[[Func, Tensor], Tensor], problem: FunctionAtPoints) -> Check:
    """What compares an answer with the derivative of the same function, taken in float64."""
    dtype = problem.x.dtype
    draw = drawing(dtype)
    # rounded as the problem's numbers are: the judge is asked about the same function
    func, _ = problem.function.make(lambda *shape: draw(*shape).double())
    expected = {"derivative": derivative(func, problem.x.to(CPU, DOUBLE))}
    return partial(relative_error, expected, TOLERANCE[dtype])


def relative_error(expected: Answer, tolerance: float, answer: Any) -> float:
    block = answer if isinstance(answer, Tensor) else from_dlpack(answer)  # or JAX's
    return check({"derivative": block}, expected, tolerance)


def mlp(inputs: int, outputs: int, width: int) -> Function:
    """A perceptron that can be had for many points, and in JAX."""
    make = partial(formulas.mlp, inputs, outputs, width)

    def batched(draw: Any) -> Func:
        first, second, last = (w.T for w in formulas.mlp_weights(inputs, outputs, width, draw))
        return lambda x: torch.tanh(torch.tanh(x @ first) @ second) @ last

    return Function(make, batched, in_jax=make)


def portable(make: Any) -> Function:
    """A function made by the same words from torch's numbers and from JAX's."""
    return Function(make, in_jax=make)
