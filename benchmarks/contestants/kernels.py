"""Who takes neural tangent kernels ``[B, B, C, C]`` of a batch with itself."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from benchmarks.contestants import by_hand
from benchmarks.contestants.per_sample import by_recipe, concatenating, detached
from benchmarks.problems.judge import Answer, reference
from benchmarks.problems.networks import CLASSES, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

KERNEL = "ntk"
MOST_BYTES = 2e9  # of tangents for all pairs of samples; beyond, a way also takes minutes

MOST_SAMPLES = 16  # for the two methods of neural-tangents that grow as fast
OURS, TORCHJD = "jacfunc", "TorchJD"
MATMUL = "vmap(jacrev), J @ J.T"
CONTRACTION, PRODUCTS = "tutorial: contraction", "tutorial: products"
RECIPES = (MATMUL, CONTRACTION, PRODUCTS)
TANGENTS = ("contraction", "products", "structured")  # neural-tangents' methods, from 1 on


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


def by_hand_written(problem: Problem) -> Run:
    matrix, batch = by_hand.kernel(problem), len(problem.args[0])
    return lambda: _folded(matrix(), batch)


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
    model, images = parts(problem)
    params = detached(model)
    tangents = len(images) ** 2 * CLASSES * sum(param.nbytes for param in params.values())
    if tangents > MOST_BYTES:
        raise NotImplementedError(f"{tangents / 1e9:.0f} GB of tangents; see smaller batches")

    def scores(image: Tensor, params: Answer) -> Any:
        return functional_call(model, params, (image[None],))[0]

    def of_pair(first: Tensor, second: Tensor) -> Any:
        value, pullback, *_ = vjp(partial(scores, first), params)
        seeds = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        push = partial(jvp, partial(scores, second), (params,))
        return vmap(lambda seed: push(pullback(seed))[1])(seeds.view(-1, *value.shape))

    pairs = vmap(vmap(of_pair, (None, 0)), (0, None))

    def run() -> Answer:
        # the fused kernels know no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            return {KERNEL: pairs(images, images)}

    return run


def by_torchjd(problem: Problem) -> Run:
    """Autogram, on a copy of the model: its hooks stay."""
    from torchjd.autogram import Engine

    model, images = parts(problem)
    own = copy.deepcopy(model)
    engine = Engine(own, batch_dim=0)
    return lambda: _folded(engine.compute_gramian(own(images)), len(images))


def by_neural_tangents(method: int, problem: Problem) -> Run:
    """The network in JAX's words."""
    model, images = parts(problem)
    if images.is_cuda:
        raise NotImplementedError("JAX takes part on the CPU alone")
    if TANGENTS[method - 1] != "structured" and len(images) > MOST_SAMPLES:
        raise NotImplementedError("up to minutes a call; see smaller batches")
    from benchmarks.contestants.neural_tangents import kernel

    compiled = kernel(model, images, method)
    # its first call compiles
    compiled()
    return lambda: {KERNEL: compiled()}


def _folded(matrix: Tensor, batch: int) -> Answer:
    """Rows and columns by sample, then class, as ``[B, B, C, C]``."""
    pairs = matrix.unflatten(1, (batch, -1)).unflatten(0, (batch, -1))
    return {KERNEL: pairs.transpose(1, 2)}


KERNELS: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(MATMUL, "torch.func", by_matmul),
    Contestant(CONTRACTION, "torch.func", by_contraction),
    Contestant(PRODUCTS, "torch.func", by_products),
    Contestant(by_hand.FACTORS, "autograd", by_hand_written),
    Contestant(TORCHJD, "rival", by_torchjd),
    *(
        Contestant(f"neural-tangents: {name}", "JAX", partial(by_neural_tangents, n), counted=False)
        for n, name in enumerate(TANGENTS, 1)
    ),
)
