"""Norms of every sample's gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import jacfunc
from benchmarks.cases import Question, best
from benchmarks.contestants.by_hand import NORMS, ghost_norms
from benchmarks.contestants.per_sample import detached
from benchmarks.problems.judge import Answer, in_double
from benchmarks.problems.networks import SMALL, case, labels_of, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

OURS, GHOSTS, GRADIENTS = "jacfunc", "by hand, ghost norms", "vmap(grad)"


def by_jacfunc(problem: Problem) -> Run:
    model, images = parts(problem)
    derive, labels = jacfunc.gradient_norms(model, F.cross_entropy), labels_of(images)
    return lambda: {NORMS: derive(images, labels)}


def by_gradients(problem: Problem) -> Run:
    """The gradients themselves, each of a batch of one."""
    model, images = parts(problem)

    def loss(params: Answer, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (image[None],)), label[None])

    derive, params, labels = vmap(grad(loss), (None, 0, 0)), detached(model), labels_of(images)
    return lambda: {NORMS: _norms(derive(params, images, labels).values()) / len(images)}


def _norms(blocks: Any) -> Any:
    return torch.cat([block.flatten(1) for block in blocks], 1).norm(dim=1)


def expected(problem: Problem) -> Answer:
    """A backward pass a sample, in float64."""
    model, images = in_double(problem)
    norms, labels = [], labels_of(images)
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None]) / len(images)
        grads = torch.autograd.grad(loss, [*model.parameters()])
        norms.append(_norms([grad[None] for grad in grads]))
    return {NORMS: torch.cat(norms)}


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(GHOSTS, "autograd", ghost_norms),
    Contestant(GRADIENTS, "torch.func", by_gradients),
)

QUESTION = Question(
    "norms",
    "Norms of every sample's gradient: from the factors of layers, or from gradients?",
    OURS,
    tuple(
        case(
            *(network, batch, CONTESTANTS, expected),
            baseline=OURS,
            wanted=(best(OURS, batch, GHOSTS, GRADIENTS),),
        )
        for network in (SMALL, "groupnorm")
        for batch in (1, 8, 64)
    ),
)
