"""Who takes part: a rival is one function here and one row of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.workloads import Answer, Problem
from jacfunc import module_jacobian

Run = Callable[[], Answer]


@dataclass(frozen=True)
class Contestant:
    """One way to the answer: ``prepare`` does once what a user would do once."""

    name: str
    family: str
    prepare: Callable[[Problem], Run]
    answers: bool = True
    """False for what only bounds the time, such as a bare write."""


def by_jacfunc(strategy: str, problem: Problem) -> Run:
    derive = module_jacobian(problem.model, problem.wrt, per_sample=True, strategy=strategy)
    return lambda: _named(derive(problem.images))


def by_torch_func(transform: Callable[..., Any], problem: Problem) -> Run:
    """The recipe of torch's tutorial: functional_call, a batch of one, vmap over samples."""
    model = problem.model
    # detached, as in the tutorial: with parameters that require grad the result keeps its graph
    params = {name: param.detach() for name, param in model.named_parameters()}

    def scores(params: dict[str, Tensor], image: Tensor) -> Tensor:
        result: Tensor = functional_call(model, params, (image[None],))[0]
        return result

    argnum = 0 if problem.wrt == "params" else 1
    derive = torch.func.vmap(transform(scores, argnums=argnum), in_dims=(None, 0))
    return lambda: _named(derive(params, problem.images))


def by_autograd_functional(vectorize: bool, problem: Problem) -> Run:
    """autograd.functional.jacobian: once for all inputs, a loop over samples for parameters."""
    model, images = problem.model, problem.images
    names = [name for name, _ in model.named_parameters()]
    params = tuple(param.detach() for param in model.parameters())
    jacobian = partial(torch.autograd.functional.jacobian, vectorize=vectorize)

    def of_params() -> Answer:
        def one(image: Tensor) -> Any:
            def scores(*values: Tensor) -> Any:
                state = dict(zip(names, values, strict=True))
                return functional_call(model, state, (image[None],))[0]

            return jacobian(scores, params)

        columns = zip(*map(one, images), strict=True)
        return {name: torch.stack(blocks) for name, blocks in zip(names, columns, strict=True)}

    def of_inputs() -> Answer:
        # samples do not touch each other, so one pullback of the summed batch holds every sample's
        def total(points: Tensor) -> Any:
            return functional_call(model, dict(zip(names, params, strict=True)), (points,)).sum(0)

        return {"input": jacobian(total, images).movedim(0, 1)}

    return of_params if problem.wrt == "params" else of_inputs


def _named(blocks: Any) -> Answer:
    return {"input": blocks} if isinstance(blocks, Tensor) else blocks


CONTESTANTS: tuple[Contestant, ...] = (
    *(
        Contestant(f"jacfunc {strategy}", "jacfunc", partial(by_jacfunc, strategy))
        for strategy in ("reverse", "forward", "looped", "auto")
    ),
    Contestant("torch.func jacrev", "torch.func", partial(by_torch_func, torch.func.jacrev)),
    Contestant("torch.func jacfwd", "torch.func", partial(by_torch_func, torch.func.jacfwd)),
    Contestant("autograd looped", "autograd.functional", partial(by_autograd_functional, False)),
    Contestant("autograd vectorized", "autograd.functional", partial(by_autograd_functional, True)),
)
BASELINE = "torch.func jacrev"
"""Whose time is 1 in every table."""


def named(name: str) -> Contestant:
    """The contestant of this name."""
    return next(contestant for contestant in CONTESTANTS if contestant.name == name)
