"""Jacobians of networks by torch alone: its recipe, its older function, and what forum posts have.

Answers are blocks ``[B, C, *param]`` by name, or one tensor ``[B, C, P]``; both in the module's
order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import CLASSES, Problem
from jacfunc._measuring.clock import Run


def by_recipe(transform: Callable[..., Any], problem: Problem) -> Run:
    """The recipe of torch's tutorial: functional_call, a batch of one, vmap over samples."""
    model, params = problem.model, _detached(problem.model)

    def scores(params: dict[str, Tensor], image: Tensor) -> Tensor:
        result: Tensor = functional_call(model, params, (image[None],))[0]
        return result

    argnum = 0 if problem.wrt == "params" else 1
    derive = torch.func.vmap(transform(scores, argnums=argnum), in_dims=(None, 0))
    return lambda: _named(derive(params, problem.images), problem)


def by_recipe_and_concatenation(problem: Problem) -> Run:
    blocks = by_recipe(torch.func.jacrev, problem)
    return lambda: _concatenated(blocks())


def by_jacrev(problem: Problem) -> Run:
    """Of one call with all images, the samples not told apart."""
    model, params = problem.model, _detached(problem.model)
    derive = torch.func.jacrev(lambda params: functional_call(model, params, (problem.images,)))
    return lambda: derive(params)


def by_jacrev_and_concatenation(problem: Problem) -> Run:
    blocks = by_jacrev(problem)
    return lambda: _concatenated(blocks())


def by_autograd_functional(vectorize: bool, problem: Problem) -> Run:
    """One call with all images."""
    model, images, params = problem.model, problem.images, _detached(problem.model)

    def scores(*values: Tensor) -> Any:
        return functional_call(model, dict(zip(params, values, strict=True)), (images,))

    def run() -> Answer:
        blocks: Any = torch.autograd.functional.jacobian(
            scores, tuple(params.values()), vectorize=vectorize
        )
        return dict(zip(params, blocks, strict=True))

    return run


def by_autograd_functional_looped(vectorize: bool, problem: Problem) -> Run:
    """Sample by sample."""
    model, images, params = problem.model, problem.images, _detached(problem.model)
    jacobian = partial(torch.autograd.functional.jacobian, vectorize=vectorize)

    def of_params(image: Tensor) -> Any:
        def scores(*values: Tensor) -> Any:
            state = dict(zip(params, values, strict=True))
            return functional_call(model, state, (image[None],))[0]

        return jacobian(scores, tuple(params.values()))

    def of_input(image: Tensor) -> Any:
        return (jacobian(lambda point: model(point[None])[0], image),)

    def run() -> Answer:
        is_params = problem.wrt == "params"
        columns = zip(*map(of_params if is_params else of_input, images), strict=True)
        names = params if is_params else ("input",)
        return {name: torch.stack(blocks) for name, blocks in zip(names, columns, strict=True)}

    return run


def by_autograd_functional_of_sum(vectorize: bool, problem: Problem) -> Run:
    """By inputs: samples do not touch each other, so the sum of their scores will do."""
    model, images = problem.model, problem.images

    def run() -> Answer:
        rows: Any = torch.autograd.functional.jacobian(
            lambda points: model(points).sum(0), images, vectorize=vectorize
        )
        return {"input": rows.movedim(0, 1)}

    return run


def by_backward_loop(problem: Problem) -> Run:
    """As forum posts write it: a backward pass a sample and class, its rows put in their place."""
    model, images = problem.model, problem.images
    params = dict(model.named_parameters())

    def run() -> Answer:
        shape = (len(images), CLASSES)
        answer = {name: param.new_empty(*shape, *param.shape) for name, param in params.items()}
        for number, image in enumerate(images):
            for label, score in enumerate(model(image[None])[0]):
                rows = torch.autograd.grad(score, list(params.values()), retain_graph=True)
                for block, row in zip(answer.values(), rows, strict=True):
                    block[number, label] = row
        return answer

    return run


def by_backward_loop_over_classes(problem: Problem) -> Run:
    """By inputs: a backward pass a class, of its scores summed over samples."""
    model, images = problem.model, problem.images

    def run() -> Answer:
        points = images.detach().requires_grad_()
        totals = model(points).sum(0)
        rows = [torch.autograd.grad(total, points, retain_graph=True)[0] for total in totals]
        return {"input": torch.stack(rows, 1)}

    return run


def by_expansion(problem: Problem) -> Run:
    """By inputs: each sample once a class, and one backward pass of all that are wanted."""
    model, images = problem.model, problem.images

    def run() -> Answer:
        copies = images.expand(CLASSES, *images.shape).flatten(0, 1).requires_grad_()
        scores = model(copies).unflatten(0, (CLASSES, -1))
        (rows,) = torch.autograd.grad(scores.diagonal(dim1=0, dim2=2).sum(), copies)
        return {"input": rows.unflatten(0, (CLASSES, -1)).transpose(0, 1)}

    return run


def by_whole_batch(problem: Problem) -> Run:
    """What ``CurvatureInterface.jacobians`` does in laplace-torch 0.3, in our words.

    Each of the B · C rows is pulled back through the whole batch. The parameters are not detached
    there, so that a graph of the sweep is kept until it ends.
    """
    model, images = problem.model, problem.images

    def scores(params: dict[str, Tensor]) -> Any:
        return functional_call(model, params, (images,))

    def run() -> Tensor:
        return _concatenated(torch.func.jacrev(scores)(dict(model.named_parameters()))).detach()

    return run


def _detached(model: nn.Module) -> Answer:
    """As in the tutorial: with parameters that require grad the result keeps its graph."""
    return {name: param.detach() for name, param in model.named_parameters()}


def _named(blocks: Any, problem: Problem) -> Answer:
    return blocks if problem.wrt == "params" else {"input": blocks}


def _concatenated(blocks: Answer) -> Tensor:
    return torch.cat([block.flatten(2) for block in blocks.values()], -1)
