"""How a derivative of a function of one tensor is taken, and by what it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import jacfunc
from benchmarks.problems.formulas import CPU, drawing
from benchmarks.problems.judge import check
from jacfunc._measuring.clock import Run
from jacfunc._measuring.results import WrongAnswerError
from jacfunc._measuring.rounds import Check, Contestant

Func = Callable[[Any], Any]

SINGLE, DOUBLE = torch.float32, torch.float64
TOLERANCE = {SINGLE: 1e-4, DOUBLE: 1e-8}
"""Largest error of an answer, relative to the largest entry."""


@dataclass(frozen=True)
class Function:
    """How a function of one tensor and a point come from drawn numbers, in whose words.

    Args:
        make: from ``draw(*shape)``, the function and a point.
        batched: from the same numbers, the function of many points, the batch in front.
        in_jax: ``make`` that takes JAX's numbers and the module ``jax.numpy``.
    """

    make: Callable[[Any], tuple[Func, Tensor]]
    batched: Callable[[Any], Func] | None = None
    in_jax: Callable[[Any, Any], tuple[Func, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
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


Way = Callable[[Problem], Func]
"""Does once what a user would do once; what it returns takes a point."""


def set_up(function: Function, dtype: torch.dtype, calls: int, device: torch.device) -> Problem:
    """The same numbers every time."""
    draw = drawing(dtype, device)
    func, x = function.make(draw)
    return Problem(function, func, (x, *(draw(*x.shape) for _ in range(calls - 1))))


# --- the judge: the plainest loop there is, in float64, without jacfunc or torch.func ---


def looped(func: Func, x: Tensor) -> Tensor:
    """One ``autograd.grad`` an output, as in the answers of forums."""
    point = x.detach().requires_grad_()
    out = func(point)
    entries = out.flatten()
    rows = [
        torch.autograd.grad(entries[i], point, retain_graph=True)[0] for i in range(len(entries))
    ]
    return torch.stack(rows).view(*out.shape, *x.shape)


def judging(derivative: Callable[[Func, Tensor], Tensor], problem: Problem) -> Check:
    """What compares an answer with the derivative of the same function, taken in float64."""
    dtype = problem.x.dtype
    draw = drawing(dtype)
    # rounded as the problem's numbers are: the judge is asked about the same function
    func, _ = problem.function.make(lambda *shape: draw(*shape).double())
    expected = derivative(func, problem.x.to(CPU, DOUBLE))
    return partial(relative_error, expected, TOLERANCE[dtype])


def relative_error(expected: Tensor, tolerance: float, answer: Any) -> float:
    """Largest difference by the largest entry expected; JAX's answers are taken, too.

    Raises:
        WrongAnswerError: it is above the tolerance, or the shapes differ.
    """
    given = answer if isinstance(answer, Tensor) else from_dlpack(answer)
    error = check({"derivative": given}, {"derivative": expected})
    if error > tolerance:
        raise WrongAnswerError(f"relative error {error:.1e}")
    return error


# --- the ways ---


def by_expanding(problem: Problem) -> Func:
    """A copy of the point for each output, one batched evaluation, one backward."""
    if problem.function.batched is None:
        raise NotImplementedError("the function takes no batch")
    batched = problem.function.batched(drawing(problem.x.dtype, problem.x.device))
    shape = problem.func(problem.x).shape
    one_hot = torch.eye(shape.numel()).to(problem.x).view(-1, *shape)

    def compute(x: Tensor) -> Tensor:
        copies = x.detach().repeat(len(one_hot), *(1 for _ in x.shape)).requires_grad_()
        (rows,) = torch.autograd.grad(batched(copies), copies, one_hot)
        return rows.view(*shape, *x.shape)

    return compute


def in_torch(way: Way, problem: Problem) -> Run:
    return at_each(way(problem), problem.points)


def in_jax(transform: str, problem: Problem) -> Run:
    """The function in JAX's words, compiled beforehand; a call ends when it is computed."""
    if problem.x.is_cuda:
        raise NotImplementedError("JAX takes part on the CPU alone")
    if problem.function.in_jax is None:
        raise NotImplementedError("not written in JAX")
    import jax
    import jax.numpy as jnp

    dtype = problem.x.dtype
    if dtype == DOUBLE:
        jax.config.update("jax_enable_x64", True)
    draw = drawing(dtype)
    func, _ = problem.function.in_jax(lambda *shape: jnp.asarray(draw(*shape).numpy()), jnp)
    compiled = jax.jit(getattr(jax, transform)(func))
    points = tuple(jnp.asarray(point.numpy()) for point in problem.points)
    return at_each(lambda x: compiled(x).block_until_ready(), points)


def at_each(compute: Func, points: tuple[Any, ...]) -> Run:
    """Every point in turn; the answer is the last one's."""
    # plans, compilation and imports that torch puts off come with the first call and are kept
    compute(points[0])

    def run() -> Any:
        for point in points:
            answer = compute(point)
        return answer

    return run


# --- as contestants ---


def plain(name: str, family: str, way: Way) -> Contestant[Problem]:
    """One that is written with torch, whoever does the work."""
    return Contestant(name, family, partial(in_torch, way))


def functional(name: str, **options: Any) -> Contestant[Problem]:
    derive = getattr(torch.autograd.functional, name)
    how = "vectorized" if options.get("vectorize") else "not vectorized"
    label = f"autograd.functional {name}, {how}"
    return plain(label, "autograd", lambda problem: partial(derive, problem.func, **options))


def jax(transform: str) -> Contestant[Problem]:
    name = f"JAX {transform}"
    return Contestant(name, "JAX", partial(in_jax, transform), counted=False)
