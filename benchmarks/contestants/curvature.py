"""Who takes the GGN of the mean cross-entropy: its exact diagonal, or its product with a vector."""

import copy

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from benchmarks.contestants import by_hand
from benchmarks.contestants.per_sample import by_recipe
from benchmarks.problems.judge import Answer, in_double, reference
from benchmarks.problems.networks import labels_of, parts
from benchmarks.verdicts.intervals import BOUND
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

OURS, AGAIN = "jacfunc", "jacfunc, same point"
BACKPACK, CURVLINOPS = "BackPACK", "curvlinops"
TWICE, FORWARD = "by hand, double backward", "by hand, forward mode"
MATERIALIZED = "vmap(jacrev), contracted"


def expected_diagonal(problem: Problem) -> Answer:
    """The diagonal from the rows that the judge takes one by one, in float64."""
    return _contracted(reference(problem), _hessians(in_double(problem)))


def by_jacfunc(problem: Problem) -> Run:
    model, images = parts(problem)
    ggn, labels = jacfunc.ggn(model, F.cross_entropy), labels_of(images)
    return lambda: ggn(images, labels).diagonal()


def by_backpack(problem: Problem) -> Run:
    """BackPACK's diagonal, on a copy of the model: what extends a model stays."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    model, images = parts(problem)
    own, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    params, labels = dict(own.named_parameters()), labels_of(images)

    def run() -> Answer:
        with backpack(DiagGGNExact()):
            loss(own(images), labels).backward()
        answer: Answer = {}
        for name, param in params.items():
            answer[name] = param.diag_ggn_exact
            del param.diag_ggn_exact
            param.grad = None
        return answer

    return run


def by_materialized(problem: Problem) -> Run:
    """The diagonal from J by the recipe, block by block, so that J is held once."""
    blocks = by_recipe(jacrev, problem)
    return lambda: _contracted(blocks(), _hessians(parts(problem)))


def _contracted(blocks: Answer, hessians: Tensor) -> Answer:
    """The diagonal of ``Jᵀ H J``, summed over samples."""
    rows = {name: block.flatten(2) for name, block in blocks.items()}
    return {
        name: (torch.bmm(hessians, rows[name]) * rows[name]).sum((0, 1)).view(block.shape[2:])
        for name, block in blocks.items()
    }


def expected_product(problem: Problem) -> Answer:
    """The judge's rows, once from the right and once from the left."""
    blocks, vector = reference(problem), vector_of(problem)
    pushed = sum(
        torch.einsum("bcp,p->bc", block.flatten(2), vector[name].double().flatten())
        for name, block in blocks.items()
    )
    seeds = torch.einsum("bcd,bd->bc", _hessians(in_double(problem)), pushed)
    return {name: torch.einsum("bc,bc...->...", seeds, block) for name, block in blocks.items()}


def by_jacfunc_product(problem: Problem) -> Run:
    """The product at a point of which nothing is known."""
    model, images = parts(problem)
    ggn, labels, vector = jacfunc.ggn(model, F.cross_entropy), labels_of(images), vector_of(problem)
    return lambda: ggn(images, labels) @ vector


def by_jacfunc_again(problem: Problem) -> Run:
    """The product at a point that has had one before: the module is not evaluated any more.

    That is another question, and less work than any product at a new point takes: a bound.
    """
    (model, images), vector = parts(problem), vector_of(problem)
    operator = jacfunc.ggn(model, F.cross_entropy)(images, labels_of(images))
    return lambda: operator @ vector


def by_double_backward(problem: Problem) -> Run:
    """``J v`` is the pullback of a pullback, which is linear in its cotangent."""
    model, images = parts(problem)
    names, params = zip(*model.named_parameters(), strict=True)
    vectors = [*vector_of(problem).values()]

    def run() -> Answer:
        with sdpa_kernel(SDPBackend.MATH):
            scores = model(images)
        seeds = torch.zeros_like(scores, requires_grad=True)
        pulled = torch.autograd.grad(scores, params, seeds, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, seeds, vectors)
        products = torch.autograd.grad(scores, params, _weighed(scores.detach(), pushed))
        return dict(zip(names, products, strict=True))

    return run


def by_forward_mode(problem: Problem) -> Run:
    """``J v`` comes with the evaluation, whose graph is then swept."""
    model, images = parts(problem)
    params, vectors = dict(model.named_parameters()), vector_of(problem)

    def run() -> Answer:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {n: forward_ad.make_dual(p, vectors[n]) for n, p in params.items()}
            scores, pushed = forward_ad.unpack_dual(functional_call(model, duals, (images,)))
            seeds = _weighed(scores.detach(), pushed.detach())
            products = torch.autograd.grad(scores, [*params.values()], seeds)
        return dict(zip(params, products, strict=True))

    return run


def _weighed(scores: Tensor, pushed: Tensor) -> Tensor:
    """The Hessian of the mean cross-entropy in the scores, times a tangent of these."""
    chances = scores.softmax(-1)
    weighed = chances * pushed
    return (weighed - chances * weighed.sum(-1, keepdim=True)) / len(scores)


def by_curvlinops(problem: Problem) -> Run:
    from curvlinops import GGNLinearOperator

    model, images = parts(problem)
    params, vector = dict(model.named_parameters()), list(vector_of(problem).values())
    data, loss, values = [(images, labels_of(images))], nn.CrossEntropyLoss(), list(params.values())
    operator = GGNLinearOperator(model, loss, values, data, check_deterministic=False)

    def run() -> Answer:
        # the fused kernels of attention know no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            return dict(zip(params, operator @ vector, strict=True))

    return run


def _hessians(network: tuple[nn.Module, Tensor]) -> Tensor:
    """Hessians of the mean cross-entropy in each sample's scores: ``[B, C, C]``."""
    model, images = network
    with torch.no_grad():
        chances = model(images).softmax(-1)
    hessians: Tensor = chances.diag_embed() - chances[:, :, None] * chances[:, None, :]
    return hessians / len(images)


def vector_of(problem: Problem) -> Answer:
    """Noise in the shape of the parameters."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(param.shape, generator=generator).to(param)
        for name, param in parts(problem)[0].named_parameters()
    }


DIAGONAL: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(by_hand.FACTORS, "autograd", by_hand.diagonal),
    Contestant(BACKPACK, "rival", by_backpack),
    Contestant(MATERIALIZED, "torch.func", by_materialized),
)
PRODUCT: tuple[Contestant[Problem], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc_product),
    Contestant(TWICE, "autograd", by_double_backward),
    Contestant(FORWARD, "autograd", by_forward_mode),
    Contestant(AGAIN, BOUND, by_jacfunc_again),
    Contestant(CURVLINOPS, "rival", by_curvlinops),
)
