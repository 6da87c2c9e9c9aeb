"""The baseline: torch's own way, as its tutorial writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from jacfunc._measuring import Run
from jacfunc._trees import map_tensors
from jacfunc._types import Argnums, Leaves, Tree
from jacfunc.compare._problem import Problem


def baseline_of(problem: Problem) -> str:
    """The name of torch's own way."""
    return "vmap(torch.func.jacrev)" if problem.is_sampled else "torch.func.jacrev"


def by_recipe(problem: Problem) -> Run:
    """``jacrev`` of the function, or of ``functional_call``; over samples with ``vmap``."""
    form = form_of(problem)
    take: Callable[..., Any] = torch.func.jacrev(form.func, argnums=form.argnums)
    if problem.is_sampled:
        take = torch.func.vmap(take, in_dims=form.dims, randomness=problem.randomness)
    return partial(take, *form.args)


@dataclass(frozen=True)
class PlainFunction:
    """A problem as a plain function, of one sample where these are differentiated alone.

    Args:
        args: of all samples.
        dims: where each of the args has the samples.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: Argnums
    dims: tuple[int | None, ...]


def form_of(problem: Problem) -> PlainFunction:
    """By torch's ``functional_call``, as its tutorial writes it."""
    module = problem.module
    if module is None:
        func = partial(problem.target, **problem.kwargs)
        return PlainFunction(func, problem.args, problem.argnums, (None,) * len(problem.args))
    tensors, dims = problem.samples()
    # detached, as in the tutorial: with parameters that require grad the result keeps its graph
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def call(params: dict[str, Tensor], *leaves: Tensor) -> Tree:
        args, kwargs = tensors.merge(as_batch(leaves, dims))
        output = functional_call(module, params, args, kwargs)
        return map_tensors(lambda x: x.squeeze(0), output) if problem.is_sampled else output

    if problem.by_params:
        return PlainFunction(call, (params, *tensors.leaves), 0, (None, *dims))
    floating = tuple(n for n, x in enumerate(tensors.leaves) if x.is_floating_point())
    return PlainFunction(partial(call, params), tensors.leaves, floating, tuple(dims))


def as_batch(leaves: Leaves, dims: list[int | None]) -> Leaves:
    """The leaves of one sample as a batch of one."""
    return tuple(x if d is None else x.unsqueeze(d) for x, d in zip(leaves, dims, strict=True))
