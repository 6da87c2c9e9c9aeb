"""Norms of every sample's gradient."""

import torch
from torch.nn import functional as F

import jacfunc
from benchmarks.cases import Question, best
from benchmarks.contestants import by_hand
from benchmarks.problems.judge import Answer, in_double, reference
from benchmarks.problems.networks import CLASSES, SMALL, case, labels_of, parts
from jacfunc._measuring import Contestant, Effort, Run
from jacfunc.compare import Problem

OURS, GHOST, GRADIENTS = "jacfunc", "by hand, ghost norms", "vmap(grad)"
EFFORT = Effort(rounds=40, seconds=1.0, fewest=5, patience=5.0)


def by_jacfunc(problem: Problem) -> Run:
    model, images = parts(problem)
    derive, labels = jacfunc.gradient_norms(model, F.cross_entropy), labels_of(images)
    return lambda: {by_hand.NORMS: derive(images, labels)}


def expected(problem: Problem) -> Answer:
    """From the rows that the judge takes one by one, in float64."""
    blocks, (model, images) = reference(problem), in_double(problem)
    scores = model(images).detach()
    seeds = (scores.softmax(-1) - F.one_hot(labels_of(images).cpu(), CLASSES)) / len(images)
    grads = [torch.einsum("bc,bcp->bp", seeds, block.flatten(2)) for block in blocks.values()]
    return {by_hand.NORMS: torch.cat(grads, 1).norm(dim=1)}


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(GHOST, "autograd", by_hand.norms),
    Contestant(GRADIENTS, "torch.func", by_hand.by_gradients),
)

QUESTION = Question(
    "norms",
    "Norms of every sample's gradient: from the factors of layers, or from gradients?",
    OURS,
    tuple(
        case(
            *(network, batch, CONTESTANTS, expected),
            baseline=OURS,
            effort=EFFORT,
            wanted=(best(OURS, batch, GHOST, GRADIENTS),),
        )
        for network in (SMALL, "groupnorm")
        for batch in (1, 8, 64)
    ),
)
