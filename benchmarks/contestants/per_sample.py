"""Who takes Jacobians of networks: jacfunc, torch's recipe, by hand, and forum posts.

Answers are blocks ``[B, C, *param]`` by name, or one tensor ``[B, C, P]`` in the module's order.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev

import jacfunc
from benchmarks.contestants import by_hand, rivals
from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import CLASSES, parts, sample_by_sample
from jacfunc import Strategy
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

OURS, FLAT, REUSED = "jacfunc auto", "jacfunc auto, flat", "jacfunc auto, flat, out="
RECIPE, CONCATENATED, ONE_CALL = "vmap(jacrev)", "vmap(jacrev) + cat", "jacrev"
LAPLACE, TORCHJD = "Laplace", "TorchJD"
LOOP = "backward, looped over classes"
FORWARD = ("jacfunc forward", "vmap(jacfwd)")

STRATEGIES: dict[str, str | Strategy] = {
    "auto": "auto",
    "reverse": "reverse",
    "reverse, 5 rows at once": jacfunc.Reverse(5),
    "looped": "looped",
    "autotune": "autotune",
}
"""Which take part in every question; one that is written here takes part."""


def by_jacfunc(problem: Problem, strategy: str | Strategy = "auto", **options: Any) -> Run:
    model, images = parts(problem)
    derive = jacfunc.module_jacobian(
        model, problem.wrt, per_sample=problem.per_sample, strategy=strategy, **options
    )
    if strategy in ("auto", "autotune"):
        # they measure, the machine or the candidates: a user waits for it once
        derive(images)
    return lambda: derive(images) if problem.by_params else {"input": derive(images)}


def by_jacfunc_as_matrix(problem: Problem) -> Run:
    """The Jacobian of one call as one matrix ``[C, P]``."""
    run = by_jacfunc(problem, flat=True)
    return lambda: run()[None]


def forecast(strategy: str | Strategy, problem: Problem) -> tuple[float | None, int | None]:
    """Seconds and bytes that jacfunc expects of one call, as a function of the parameters."""
    model, images = parts(problem)
    scores = lambda params: functional_call(model, params, (images,))  # noqa: E731
    plan = jacfunc.plan(scores, detached(model), strategy=strategy).forecast
    return (None, None) if plan is None else (plan.seconds, plan.peak_bytes)


def detached(model: nn.Module) -> Answer:
    """Parameters as torch's tutorial has them: with those that require grad a graph is kept."""
    return {name: param.detach() for name, param in model.named_parameters()}


def by_recipe(transform: Callable[..., Any], problem: Problem) -> Run:
    """The recipe of torch's tutorial: functional_call, a batch of one, vmap over samples.

    On a copy of the model: functional_call gives a recurrent layer a new list of its weights, and
    the others who take part would find another model than in the round before.
    """
    model, images = copy.deepcopy(parts(problem))
    params = detached(model)

    def scores(params: Answer, image: Tensor) -> Any:
        return functional_call(model, params, (image[None],))[0]

    derive = torch.func.vmap(transform(scores, argnums=int(not problem.by_params)), (None, 0))
    if problem.by_params:
        return lambda: derive(params, images)
    return lambda: {"input": derive(params, images)}


def by_jacrev(problem: Problem) -> Run:
    """The Jacobian of one call with all images, in which samples are not told apart."""
    model, images = parts(problem)
    params = detached(model)
    derive = jacrev(lambda params: functional_call(model, params, (images,)))
    return lambda: derive(params)


def concatenating(way: Callable[[Problem], Run], problem: Problem) -> Run:
    """A way whose blocks are put into one matrix."""
    blocks = way(problem)
    return lambda: _joined(blocks())


def _joined(blocks: Answer) -> Tensor:
    return torch.cat([block.flatten(2) for block in blocks.values()], -1)


def by_backward_loop(problem: Problem) -> Run:
    """The loop of forum posts: a backward pass a sample and class, whose rows are put in place."""
    model, images = parts(problem)
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
    """The Jacobian by inputs: a backward pass a class, of its scores summed over samples."""
    model, images = parts(problem)
    own = copy.deepcopy(model).requires_grad_(False)

    def run() -> Answer:
        points = images.detach().requires_grad_()
        totals = own(points).sum(0)
        rows = [torch.autograd.grad(total, points, retain_graph=True)[0] for total in totals]
        return {"input": torch.stack(rows, 1)}

    return run


def by_expansion(problem: Problem) -> Run:
    """The Jacobian by inputs: a copy of each sample for each class, and one backward pass."""
    model, images = parts(problem)

    def run() -> Answer:
        copies = images.expand(CLASSES, *images.shape).flatten(0, 1).requires_grad_()
        scores = model(copies).unflatten(0, (CLASSES, -1))
        (rows,) = torch.autograd.grad(scores.diagonal(dim1=0, dim2=2).sum(), copies)
        return {"input": rows.unflatten(0, (CLASSES, -1)).transpose(0, 1)}

    return run


def _ours(
    strategies: Mapping[str, str | Strategy], with_forecast: bool = False
) -> tuple[Contestant[Problem], ...]:
    ours = []
    for name, strategy in strategies.items():
        way = partial(by_jacfunc, strategy=strategy)
        said = partial(forecast, strategy) if with_forecast else None
        ours.append(Contestant(f"jacfunc {name}", "jacfunc", way, forecast=said))
    return tuple(ours)


BY_RECIPE = Contestant(RECIPE, "torch.func", partial(by_recipe, jacrev))
BY_CONCATENATION = Contestant(CONCATENATED, "torch.func", partial(concatenating, BY_RECIPE.prepare))
PARAMS: tuple[Contestant[Problem], ...] = (
    *_ours(STRATEGIES | {"structured": "structured"}),
    Contestant(FLAT, "jacfunc", partial(by_jacfunc, flat=True)),
    # into one tensor that is there, as in a loop over batches
    Contestant(
        REUSED, "jacfunc", lambda p: by_jacfunc(p, flat=True, out=by_jacfunc(p, flat=True)())
    ),
    BY_RECIPE,
    BY_CONCATENATION,
    *by_hand.JACOBIANS,
    Contestant("backward, looped", "autograd", by_backward_loop),
    Contestant(LAPLACE, "rival", rivals.by_laplace),
    Contestant("Opacus", "rival", rivals.by_opacus),
    Contestant("BackPACK", "rival", rivals.by_backpack),
    Contestant(TORCHJD, "rival", rivals.by_torchjd),
    Contestant("TorchJD, looped", "rival", partial(sample_by_sample, rivals.by_torchjd)),
)
INPUTS: tuple[Contestant[Problem], ...] = (
    *_ours(STRATEGIES | {"forward": "forward"}),
    BY_RECIPE,
    Contestant("vmap(jacfwd)", "torch.func", partial(by_recipe, jacfwd)),
    Contestant(LOOP, "autograd", by_backward_loop_over_classes),
    Contestant(by_hand.ONE_GRAPH, "autograd", by_hand.by_one_graph),
    Contestant("expand and backward once", "autograd", by_expansion),
)
WHOLE: tuple[Contestant[Problem], ...] = (
    *_ours(STRATEGIES | {"structured": "structured"}, with_forecast=True),
    Contestant(FLAT, "jacfunc", by_jacfunc_as_matrix),
    Contestant(ONE_CALL, "torch.func", by_jacrev),
    Contestant("jacrev + cat", "torch.func", partial(concatenating, by_jacrev)),
    Contestant(by_hand.FACTORS, "autograd", by_hand.jacobian),  # right where samples are alone
    Contestant("backward, looped", "autograd", by_backward_loop),
    Contestant(LAPLACE, "rival", rivals.by_laplace),
    Contestant(TORCHJD, "rival", rivals.by_torchjd),
)
