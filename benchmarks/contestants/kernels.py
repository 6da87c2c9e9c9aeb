"""Who takes neural tangent kernels ``[B, B, C, C]`` of a batch with itself."""

import copy
from functools import partial

import torch
from torch import Tensor
from torch.func import jacrev

import jacfunc
from benchmarks.contestants import by_hand
from benchmarks.contestants.by_hand import KERNEL
from benchmarks.contestants.per_sample import by_recipe, concatenating
from benchmarks.problems.judge import Answer, reference
from benchmarks.problems.networks import parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

OURS, MATMUL, TORCHJD = "jacfunc", "vmap(jacrev), J @ J.T", "TorchJD"


def expected(problem: Problem) -> Answer:
    """The kernel from the rows that the judge takes one by one, in float64."""
    blocks = reference(problem)
    batch, classes = next(iter(blocks.values())).shape[:2]
    total = torch.zeros(batch * classes, batch * classes, dtype=torch.float64)
    while blocks:
        rows = blocks.popitem()[1].flatten(2).flatten(0, 1)
        total += rows @ rows.T
    return _folded(total, batch)


def by_jacfunc(problem: Problem) -> Run:
    model, images = parts(problem)
    return lambda: {KERNEL: jacfunc.ntk(model, None, images)}


def by_matmul(problem: Problem) -> Run:
    """J by the recipe, in one matrix, and one product: the fewest calls."""
    matrix, batch = concatenating(partial(by_recipe, jacrev), problem), len(problem.args[0])

    def run() -> Answer:
        rows = matrix().flatten(0, 1)
        return _folded(rows @ rows.T, batch)

    return run


def by_torchjd(problem: Problem) -> Run:
    """Autogram, on a copy of the model: its hooks stay."""
    from torchjd.autogram import Engine

    model, images = parts(problem)
    own = copy.deepcopy(model)
    engine = Engine(own, batch_dim=0)
    return lambda: _folded(engine.compute_gramian(own(images)), len(images))


def _folded(matrix: Tensor, batch: int) -> Answer:
    """Rows and columns by sample, then class, as ``[B, B, C, C]``."""
    pairs = matrix.unflatten(1, (batch, -1)).unflatten(0, (batch, -1))
    return {KERNEL: pairs.transpose(1, 2)}


KERNELS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(MATMUL, "torch.func", by_matmul),
    Contestant(by_hand.FACTORS, "autograd", by_hand.kernel),
    Contestant(TORCHJD, "rival", by_torchjd),
)
