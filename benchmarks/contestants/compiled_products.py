"""Who multiplies a curvature by a vector once it is compiled, beside one gradient.

What arithmetic allows, in products of matrices as large as a layer's forward pass: a gradient takes
3 of them, a product with a Gauss-Newton matrix 5, or 4 at a point that was evaluated, one with a
Hessian 8, or 6. Of the first layer, whose input has no derivative, these are 2, 3, 2, 3 and 2. From
factors that are kept a Gauss-Newton product takes 2 of every layer, and reads the cotangents of
every layer twice. So a product with a Hessian at a point takes 1.33 gradients of the network of
536k, 1.57 of that of 1502k, and 2 of a deep one; with a Gauss-Newton matrix 1.10, 1.19 and 4/3
through layers, 0.89, 0.81 and 2/3 from factors. Fewer are for networks that wait for dispatch.
curvlinops publishes 0.87 and 1.06 for the network of 1502k on a GPU, where the unit is a gradient
that is not compiled, and takes as long when it is: there dispatch ruled (0.2 ms of arithmetic in
1.7 ms). Of its larger networks it publishes 1.2 to 2.0 and 1.7 to 2.8 in that unit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import jacfunc
from benchmarks.contestants.curvature import by_double_backward, vector_of
from benchmarks.contestants.per_sample import detached
from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import DEEP, LARGE, NARROW, TINY, labels_of, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

Params = dict[str, Tensor]
Product = Callable[[Params, Tensor, Params], Params]  # of parameters, images and a vector

COMPILED, AT_POINT, EAGER = "jacfunc compiled", "jacfunc compiled, same point", "jacfunc"
CASES = (
    *((TINY, 8), (LARGE, 64), (DEEP, 512)),
    *((NARROW, 2), ("transformer", 8), ("transformer", 64)),
)
GRADIENT, COMPILED_GRADIENT = "one gradient", "one gradient, compiled"


def loss_of(problem: Problem) -> Callable[[Params, Tensor], Tensor]:
    model = parts(problem)[0]

    def loss(params: Params, images: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, images), labels_of(images))

    return loss


def with_hessian(problem: Problem) -> Product:
    loss = loss_of(problem)

    def product(params: Params, images: Tensor, vector: Params) -> Any:
        return jacfunc.hvp(lambda params: loss(params, images), (params,), (vector,))[1][0]

    return product


def with_gauss_newton(problem: Problem) -> Product:
    model = parts(problem)[0]

    def scores(params: Params, images: Tensor) -> Any:
        return functional_call(model, params, images)

    def product(params: Params, images: Tensor, vector: Params) -> Any:
        ggn = jacfunc.ggn(scores, F.cross_entropy)
        return ggn(params, images, labels_of(images)) @ vector

    return product


def point_of(problem: Problem) -> tuple[Params, Tensor]:
    model, images = parts(problem)
    return detached(model), images


def once(run: Run) -> Run:
    """The run behind a first one, for which a user waits while it is compiled."""
    run()
    return run


def compiled(make: Callable[[Problem], Product], problem: Problem) -> Run:
    """At a point of which nothing is known."""
    product, vector = jacfunc.compile(make(problem)), vector_of(problem)
    return once(lambda: product(*point_of(problem), vector))


def at_point(make: Callable[[Problem], Product], problem: Problem) -> Run:
    """At a point that has had a product before."""
    product = jacfunc.compile(make(problem)).at(*point_of(problem))
    vector = vector_of(problem)
    return once(lambda: product(vector))


def eager(make: Callable[[Problem], Product], problem: Problem) -> Run:
    product, vector = make(problem), vector_of(problem)
    return once(lambda: product(*point_of(problem), vector))


def gradient(problem: Problem) -> Run:
    """What the products are measured in: a backward pass, as in training."""
    model, images = parts(problem)
    params, labels = list(model.parameters()), labels_of(images)
    return lambda: torch.autograd.grad(F.cross_entropy(model(images), labels), params)


def compiled_gradient(problem: Problem) -> Run:
    derive = jacfunc.compile(torch.func.grad(loss_of(problem)))
    return once(lambda: derive(*point_of(problem)))


def expected_ggn(problem: Problem) -> Answer:
    """``Jᵀ H J v`` in float64 by three pullbacks, as all rows of J would not fit into memory."""
    return dict(by_double_backward(problem.to(problem.device, torch.float64))())


def contestants(make: Callable[[Problem], Product]) -> tuple[Contestant[Problem], ...]:
    """All ways to take a product, and the gradient, which is no answer."""
    return (
        Contestant(COMPILED, "jacfunc", partial(compiled, make)),
        Contestant(AT_POINT, "jacfunc", partial(at_point, make)),
        Contestant(EAGER, "jacfunc", partial(eager, make)),
        Contestant(GRADIENT, "bound", gradient, answers=False),
        Contestant(COMPILED_GRADIENT, "bound", compiled_gradient, answers=False),
    )


HVP, GGN = contestants(with_hessian), contestants(with_gauss_newton)
