"""Who takes the same derivative again and again: compiled by jacfunc, by torch, by JAX, or not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacfunc
from benchmarks.contestants.functions import in_jax, plain
from benchmarks.problems.functions import FunctionAtPoints
from benchmarks.problems.judge import Func, looped
from jacfunc._measuring import Contestant

COMPILED, CAPTURED, OURS = "jacfunc compiled", "jacfunc as a CUDA graph", "jacfunc"
EAGER, JAX = "torch.func", "JAX jit"
Derive = Callable[[Any], Callable[[Func], Func]]  # of jacfunc, torch.func or jax, what derives


def each(derive: str) -> Derive:
    """Takes the derivative of every sample."""
    return lambda library: lambda func: library.vmap(getattr(library, derive)(func))


def one(derive: str) -> Derive:
    """Takes the derivative at one point."""
    return lambda library: getattr(library, derive)


def in_turn(func: Func, xs: Tensor) -> Tensor:
    """The Jacobians of all samples, one after the other."""
    return torch.stack([looped(func, x) for x in xs])


def compiled(backend: Any, derive: Derive) -> Callable[[FunctionAtPoints], Func]:
    return lambda problem: jacfunc.compile(derive(jacfunc)(problem.func), backend=backend)


def captured(derive: Derive, problem: FunctionAtPoints) -> Func:
    """As one CUDA graph."""
    if not problem.x.is_cuda:
        raise NotImplementedError("CUDA has graphs, no CPU has")
    return compiled("cudagraphs", derive)(problem)


def by_torch(derive: Derive, problem: FunctionAtPoints) -> Func:
    """The call of torch.func's derivative, compiled by torch."""
    func = problem.func
    whole: Func = torch.compile(lambda x: derive(torch.func)(func)(x), fullgraph=True)
    return whole


def contestants(
    derive: Derive, theirs: Derive | None = None
) -> tuple[Contestant[FunctionAtPoints], ...]:
    """All who take a derivative; the others may take it another way."""
    their = theirs or derive
    return (
        plain(COMPILED, "jacfunc", compiled("inductor", derive)),
        plain("jacfunc replayed", "jacfunc", compiled("replay", derive)),
        plain(CAPTURED, "jacfunc", partial(captured, derive)),
        plain(OURS, "jacfunc", lambda problem: derive(jacfunc)(problem.func)),
        plain(EAGER, "torch.func", lambda problem: their(torch.func)(problem.func)),
        plain("torch.compile of torch.func", "torch.func", partial(by_torch, their)),
        Contestant(JAX, "JAX", partial(in_jax, their), counted=False),
    )
