"""The GGN of the mean cross-entropy: its exact diagonal, and its product with a vector."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.per_sample import by_recipe
from benchmarks.problems.judge import Answer, case_of, reference
from benchmarks.problems.networks import LARGE, LENET, Problem
from jacfunc._measuring.clock import Run
from jacfunc._measuring.rounds import Contestant

OURS, AGAIN = "jacfunc", "jacfunc, same point"
BACKPACK, CURVLINOPS = "BackPACK", "curvlinops"
MATERIALIZED = "vmap(jacrev), contracted"


def expected_diagonal(problem: Problem) -> Answer:
    """From the rows that the judge takes one by one, in float64."""
    return _contracted(reference(problem), _hessians(_scores(problem, torch.float64)))


def expected_product(problem: Problem) -> Answer:
    """The same rows, once from the right and once from the left."""
    blocks, vector = reference(problem), _vector(problem)
    pushed = sum(
        torch.einsum("bcp,p->bc", block.flatten(2), vector[name].double().flatten())
        for name, block in blocks.items()
    )
    hessians = _hessians(_scores(problem, torch.float64))
    seeds = torch.einsum("bcd,bd->bc", hessians, pushed)
    return {name: torch.einsum("bc,bc...->...", seeds, block) for name, block in blocks.items()}


def by_jacfunc(problem: Problem) -> Run:
    ggn, labels = jacfunc.ggn(problem.model, F.cross_entropy), _labels(problem)
    return lambda: _as_blocks(ggn(problem.images, labels).diagonal(), problem)


def by_backpack(problem: Problem) -> Run:
    """On a copy of the model: what extends it stays."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    model, loss = extend(copy.deepcopy(problem.model)), extend(nn.CrossEntropyLoss())
    params, labels = dict(model.named_parameters()), _labels(problem)

    def run() -> Answer:
        with backpack(DiagGGNExact()):
            loss(model(problem.images), labels).backward()
        answer: Answer = {}
        for name, param in params.items():
            answer[name] = param.diag_ggn_exact
            del param.diag_ggn_exact
            param.grad = None
        return answer

    return run


def by_materialized(problem: Problem) -> Run:
    """Block by block, so that J is held once."""
    blocks = by_recipe(jacrev, problem)

    def run() -> Answer:
        return _contracted(blocks(), _hessians(_scores(problem)))

    return run


def by_jacfunc_product(problem: Problem) -> Run:
    """From the start: nothing is known of the point."""
    ggn, labels = jacfunc.ggn(problem.model, F.cross_entropy), _labels(problem)
    vector = _vector(problem)
    return lambda: _as_blocks(ggn(problem.images, labels) @ vector, problem)


def by_jacfunc_again(problem: Problem) -> Run:
    """One more product at a point that has had one."""
    operator = jacfunc.ggn(problem.model, F.cross_entropy)(problem.images, _labels(problem))
    vector = _vector(problem)
    return lambda: _as_blocks(operator @ vector, problem)


def by_curvlinops(problem: Problem) -> Run:
    from curvlinops import GGNLinearOperator

    params, vector = dict(problem.model.named_parameters()), list(_vector(problem).values())
    operator = GGNLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(),
        list(params.values()),
        [(problem.images, _labels(problem))],
        check_deterministic=False,
    )

    def run() -> Answer:
        # the fused kernels of attention know no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            return dict(zip(params, operator @ vector, strict=True))

    return run


def _contracted(blocks: Answer, hessians: Tensor) -> Answer:
    """The diagonal of ``Jᵀ H J``, summed over samples."""
    answer = {}
    for name, block in blocks.items():
        rows = block.flatten(2)
        total = (torch.bmm(hessians, rows) * rows).sum((0, 1))
        answer[name] = total.view(block.shape[2:])
    return answer


def _hessians(scores: Tensor) -> Tensor:
    """Of the mean cross-entropy in each sample's scores: ``[B, C, C]``."""
    chances = scores.softmax(-1)
    return (chances.diag_embed() - chances[:, :, None] * chances[:, None, :]) / len(scores)


def _scores(problem: Problem, dtype: torch.dtype | None = None) -> Tensor:
    model = problem.model if dtype is None else copy.deepcopy(problem.model).to(dtype)
    with torch.no_grad():
        scores: Tensor = model(problem.images.to(dtype=dtype))
    return scores


def _labels(problem: Problem) -> Tensor:
    return torch.arange(len(problem.images), device=problem.images.device) % 10


def _vector(problem: Problem) -> Answer:
    """Noise in the shape of the parameters."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(param.shape, generator=generator).to(param.device)
        for name, param in problem.model.named_parameters()
    }


def _as_blocks(answer: Any, problem: Problem) -> Answer:
    """By name, be it one vector or a tree."""
    if not isinstance(answer, Tensor):
        return dict(answer)
    params = dict(problem.model.named_parameters())
    pieces = answer.split([param.numel() for param in params.values()])
    return {n: piece.view_as(params[n]) for n, piece in zip(params, pieces, strict=True)}


DIAGONAL: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(BACKPACK, "rival", by_backpack),
    Contestant(MATERIALIZED, "torch.func", by_materialized),
)
PRODUCT: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc_product),
    Contestant(AGAIN, "jacfunc", by_jacfunc_again),
    Contestant(CURVLINOPS, "rival", by_curvlinops),
)

FEW, MANY, MOST = 16, 64, 128


def _diagonal(network: str, batch: int = MANY, *wanted: tuple[float, str]) -> Case:
    """As many times faster than others as is wanted."""
    return case_of(
        network,
        batch,
        DIAGONAL,
        expected_diagonal,
        baseline=OURS,
        wanted=tuple(Wanted(OURS, "times faster than", b, (other,)) for b, other in wanted),
        is_quick=batch == FEW,
    )


def _product(network: str) -> Case:
    wanted = (Wanted(OURS, "time ÷", 1.0, (CURVLINOPS,)),)
    return case_of(network, MANY, PRODUCT, expected_product, baseline=OURS, wanted=wanted)


QUESTIONS = (
    Question(
        "ggn-diagonal",
        "The exact diagonal of a Gauss-Newton matrix: from the factors of layers, or through J?",
        OURS,
        (
            _diagonal(LENET, FEW),
            _diagonal(LENET, MANY, (1.2, BACKPACK), (4.0, MATERIALIZED)),
            _diagonal(LARGE, MANY, (1.4, BACKPACK), (100.0, MATERIALIZED)),
            _diagonal(LARGE, MOST, (1.4, BACKPACK), (100.0, MATERIALIZED)),
            _diagonal("transformer"),
        ),
    ),
    Question(
        "ggn-product",
        "A Gauss-Newton matrix times a vector: by which library?",
        OURS,
        tuple(map(_product, (LARGE, LENET, "transformer"))),
    ),
)
