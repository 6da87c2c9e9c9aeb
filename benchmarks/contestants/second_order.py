"""Who multiplies a loss's Hessian by a vector: compositions of torch.func, autograd, jacfunc."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from benchmarks.contestants.curvature import vector_of
from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import labels_of, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]
Way = Callable[[Loss, Params, Params], Params]

OURS = "jacfunc hvp"


def by_way(way: Way, problem: Problem) -> Run:
    """The fused kernels of attention know no second derivative."""
    loss, params = _loss(problem)
    vector = vector_of(problem)

    def run() -> Answer:
        with sdpa_kernel(SDPBackend.MATH):
            return way(loss, params, vector)

    return run


def by_jacfunc(problem: Problem) -> Run:
    """As a user calls it: nobody needs to know which kernels it takes."""
    loss, params = _loss(problem)
    vector = vector_of(problem)
    return lambda: jacfunc.hvp(loss, (params,), (vector,))[1][0]


def pushed(loss: Loss, params: Params, vector: Params) -> Any:
    return torch.func.jvp(torch.func.grad(loss), (params,), (vector,))[1]


def pulled(loss: Loss, params: Params, vector: Params) -> Any:
    return torch.func.vjp(torch.func.grad(loss), params)[1](vector)[0]


def pulled_back_through_a_push(loss: Loss, params: Params, vector: Params) -> Any:
    along = lambda params: torch.func.jvp(loss, (params,), (vector,))[1]  # noqa: E731
    return torch.func.grad(along)(params)


def of_an_inner_product(loss: Loss, params: Params, vector: Params) -> Any:
    def inner(params: Params) -> Any:
        gradient = torch.func.grad(loss)(params)
        return sum((gradient[name] * vector[name]).sum() for name in gradient)

    return torch.func.grad(inner)(params)


def functional(name: str) -> Way:
    product = getattr(torch.autograd.functional, name)

    def way(loss: Loss, params: Params, vector: Params) -> Params:
        on_leaves = lambda *leaves: loss(dict(zip(params, leaves, strict=True)))  # noqa: E731
        products = product(on_leaves, tuple(params.values()), tuple(vector.values()))[1]
        return dict(zip(params, products, strict=True))

    return way


def expected(problem: Problem) -> Answer:
    """Two pullbacks in float64, of a copy of the network."""
    model, images = parts(problem)
    own = copy.deepcopy(model).double()
    leaves = dict(own.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        value = F.cross_entropy(own(images.double()), labels_of(images))
    first = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    seeds = [seed.double() for seed in vector_of(problem).values()]
    products = torch.autograd.grad(first, list(leaves.values()), seeds, materialize_grads=True)
    return dict(zip(leaves, products, strict=True))


def _loss(problem: Problem) -> tuple[Loss, Params]:
    """The mean cross-entropy as a function of the parameters."""
    model, images = parts(problem)
    labels = labels_of(images)
    params = {name: param.detach() for name, param in model.named_parameters()}
    return lambda params: F.cross_entropy(functional_call(model, params, images), labels), params


RIVALS: tuple[Contestant[Problem], ...] = tuple(
    Contestant(name, name.split()[0], partial(by_way, way))
    for name, way in (
        ("torch.func jvp of grad", pushed),
        ("torch.func vjp of grad", pulled),
        ("torch.func grad of jvp", pulled_back_through_a_push),
        ("torch.func grad of ⟨grad, v⟩", of_an_inner_product),
        ("autograd.functional hvp", functional("hvp")),
        ("autograd.functional vhp", functional("vhp")),
    )
)
CONTESTANTS = (Contestant(OURS, "jacfunc", by_jacfunc), *RIVALS)
