"""Neural tangent kernels ``[B, B, C, C]`` of a batch with itself: jacfunc, the recipes, rivals."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from benchmarks.cases import ANSWER, Case, Question, Wanted
from benchmarks.contestants.per_sample import by_recipe
from benchmarks.problems.judge import Answer, case_of, reference
from benchmarks.problems.networks import CLASSES, LARGE, LENET, RECURRENT, SHORT, Problem
from jacfunc._measuring.clock import Run
from jacfunc._measuring.rounds import Contestant, Effort

KERNEL = "ntk"
MOST_BYTES = 2e9
"""Of tangents, where a way needs some for each pair of samples; beyond, it also takes minutes."""

MOST_SAMPLES = 16
"""For the two methods of neural-tangents that grow as fast."""

OURS, TORCHJD = "jacfunc", "TorchJD"
MATMUL = "vmap(jacrev), J @ J.T"
CONTRACTION, PRODUCTS = "tutorial: contraction", "tutorial: products"
STRUCTURED = "structured"
TANGENTS = ("contraction", "products", STRUCTURED)
"""Methods of neural-tangents, in the order of their numbers from 1."""


def expected(problem: Problem) -> Answer:
    """From the rows that the judge takes one by one, in float64."""
    blocks = reference(problem)
    batch, classes = next(iter(blocks.values())).shape[:2]
    total = torch.zeros(batch * classes, batch * classes, dtype=torch.float64)
    while blocks:
        rows = blocks.popitem()[1].flatten(2).flatten(0, 1)
        total += rows @ rows.T
    return _folded(total, batch)


def by_jacfunc(problem: Problem) -> Run:
    return lambda: {KERNEL: jacfunc.ntk(problem.model, None, problem.images)}


def by_matmul(problem: Problem) -> Run:
    """J by the recipe, in one matrix, and one product: the fewest calls."""
    blocks = by_recipe(jacrev, problem)

    def run() -> Answer:
        rows = torch.cat([block.flatten(2) for block in blocks().values()], -1).flatten(0, 1)
        return _folded(rows @ rows.T, len(problem.images))

    return run


def by_contraction(problem: Problem) -> Run:
    """The tutorial's "Jacobian contraction", without the second J of two equal batches."""
    blocks = by_recipe(jacrev, problem)

    def run() -> Answer:
        rows = [block.flatten(2) for block in blocks().values()]
        kernels = [torch.einsum("Naf,Mbf->NMab", block, block) for block in rows]
        return {KERNEL: torch.stack(kernels).sum(0)}

    return run


def by_products(problem: Problem) -> Run:
    """The tutorial's "NTK-vector products": a vjp, then a jvp, for each pair of samples."""
    model, images = problem.model, problem.images
    params = {name: param.detach() for name, param in model.named_parameters()}
    held = len(images) ** 2 * CLASSES * sum(param.nbytes for param in params.values())
    if held > MOST_BYTES:
        raise NotImplementedError(f"{held / 1e9:.0f} GB of tangents; see smaller batches")

    def scores(image: Tensor, params: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(model, params, (image[None],))[0]
        return result

    def of_pair(first: Tensor, second: Tensor) -> Tensor:
        value, pullback, *_ = vjp(partial(scores, first), params)

        def row(seed: Tensor) -> Tensor:
            tangents: Tensor = jvp(partial(scores, second), (params,), pullback(seed))[1]
            return tangents

        seeds = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        rows: Tensor = vmap(row)(seeds.view(-1, *value.shape))
        return rows

    pairs = vmap(vmap(of_pair, (None, 0)), (0, None))

    def run() -> Answer:
        # the fused kernels know no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            return {KERNEL: pairs(images, images)}

    return run


def by_torchjd(problem: Problem) -> Run:
    """Autogram, on a copy of the model: its hooks stay."""
    from torchjd.autogram import Engine

    model, images = copy.deepcopy(problem.model), problem.images
    engine = Engine(model, batch_dim=0)
    return lambda: _folded(engine.compute_gramian(model(images)), len(images))


def by_neural_tangents(method: int, problem: Problem) -> Run:
    """On the network in JAX's words."""
    if problem.images.is_cuda:
        raise NotImplementedError("JAX takes part on the CPU alone")
    if TANGENTS[method - 1] != STRUCTURED and len(problem.images) > MOST_SAMPLES:
        raise NotImplementedError("up to minutes a call; see smaller batches")
    from benchmarks.contestants.neural_tangents import kernel

    found = kernel(problem.model, problem.images, method)
    # its first call compiles
    found()
    return lambda: {KERNEL: found()}


def _folded(matrix: Tensor, batch: int) -> Answer:
    """Rows and columns by sample, then class, as ``[B, B, C, C]``."""
    pairs = matrix.unflatten(1, (batch, -1)).unflatten(0, (batch, -1))
    return {KERNEL: pairs.transpose(1, 2)}


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(MATMUL, "torch.func", by_matmul),
    Contestant(CONTRACTION, "torch.func", by_contraction),
    Contestant(PRODUCTS, "torch.func", by_products),
    Contestant(TORCHJD, "rival", by_torchjd),
    *(
        Contestant(
            f"neural-tangents: {name}", "JAX", partial(by_neural_tangents, number), counted=False
        )
        for number, name in enumerate(TANGENTS, 1)
    ),
)

EFFORT = Effort(rounds=20, seconds=2.0, fewest=3, patience=5.0)
"""Through J it takes up to ten seconds, beside hundredths: once is enough."""

FEW, MANY = 8, 64
RECIPES = (MATMUL, CONTRACTION, PRODUCTS)


def _case(network: str, batch: int, *wanted: Wanted) -> Case:
    return case_of(
        network,
        batch,
        CONTESTANTS,
        expected,
        baseline=OURS,
        effort=EFFORT,
        wanted=wanted,
        is_quick=(network, batch) == (LENET, FEW),
    )


def _faster(bound: float) -> tuple[Wanted, Wanted]:
    """Than the recipes, and than TorchJD."""
    return (
        Wanted(OURS, "times faster than", bound, RECIPES),
        Wanted(OURS, "times faster than", 1.0, (TORCHJD,)),
    )


def _peak(bound: float) -> Wanted:
    return Wanted(OURS, "peak ÷", bound, (ANSWER,))


QUESTION = Question(
    "ntk",
    "Neural tangent kernels of a batch with itself: from the factors of layers, or through J?",
    OURS,
    (
        *(_case(network, FEW) for network in (LARGE, LENET, "transformer")),
        _case(LARGE, MANY, *_faster(200), _peak(0.05)),
        _case(LENET, MANY, *_faster(8)),
        _case("transformer", MANY, *_faster(1), _peak(0.4)),
        _case(SHORT, MANY, *_faster(1.2), _peak(0.4)),
        _case(RECURRENT, MANY),
    ),
)
