"""Jacobians of networks, per sample and of one call: by which way, by which library?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.func import functional_call, jacfwd, jacrev

import jacfunc
from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants import per_sample as contestants
from benchmarks.contestants import rivals
from benchmarks.problems.judge import case_of
from benchmarks.problems.networks import Problem
from jacfunc import Strategy
from jacfunc._measuring.clock import Run
from jacfunc._measuring.results import Expected
from jacfunc._measuring.rounds import Contestant, Effort

OURS, FLAT, REUSED = "jacfunc auto", "jacfunc auto, flat", "jacfunc auto, flat, out="
RECIPE, CONCATENATED = "vmap(jacrev)", "vmap(jacrev) + cat"
ONE_CALL = "jacrev"
LAPLACE, WHOLE_BATCH, TORCHJD = "Laplace", "jacrev of the whole batch", "TorchJD"
FORWARD = ("jacfunc forward", "vmap(jacfwd)")

FEW, MANY = 8, 64
COMPARED = ("mlp", "cnn", "resnet", "transformer", "vit")
WANTED = ("mlp", "cnn", "transformer")
"""Networks of which a certain speed and peak is wanted."""

PIXELWISE = {"mlp": MANY, "cnn": FEW, "transformer": FEW, "vit": FEW}
"""Most samples with which forward mode, a tangent a pixel, keeps to seconds and to a gigabyte."""

EFFORT = Effort(rounds=20, seconds=1.5, fewest=3, patience=15.0)

STRATEGIES: dict[str, str | Strategy] = {
    "auto": "auto",
    "reverse": "reverse",
    "reverse, 5 rows at once": jacfunc.Reverse(5),
    "looped": "looped",
    "autotune": "autotune",
}
"""Which take part in every question; one that is written here takes part."""


def by_jacfunc(problem: Problem, per_sample: bool = True, **options: Any) -> Run:
    derive = jacfunc.module_jacobian(problem.model, problem.wrt, per_sample=per_sample, **options)
    if options.get("strategy") in ("auto", "autotune"):
        # they measure, the machine or the candidates: a user waits for it once
        derive(problem.images)
    if problem.wrt == "params":
        return lambda: derive(problem.images)
    return lambda: {"input": derive(problem.images)}


def by_jacfunc_as_matrix(problem: Problem) -> Run:
    """Of one call, ``[C, P]``."""
    run = by_jacfunc(problem, per_sample=False, strategy="auto", flat=True)
    return lambda: run()[None]


def by_reusing(problem: Problem) -> Run:
    """Into one tensor that is there, as in a loop over batches."""
    compute = partial(by_jacfunc, problem, strategy="auto", flat=True)
    return compute(out=compute()())


def forecast(strategy: str | Strategy, problem: Problem) -> Expected | None:
    """What jacfunc says of one call, the parameters being an argument."""
    params = {name: param.detach() for name, param in problem.model.named_parameters()}

    def scores(params: Any) -> Any:
        return functional_call(problem.model, params, (problem.images,))

    found = jacfunc.plan(scores, params, strategy=strategy).forecast
    return None if found is None else Expected(found.seconds, found.peak_bytes)


def _ours(strategies: Mapping[str, str | Strategy]) -> tuple[Contestant[Problem], ...]:
    return tuple(
        Contestant(f"jacfunc {name}", "jacfunc", partial(by_jacfunc, strategy=strategy))
        for name, strategy in strategies.items()
    )


def _either(
    family: str, way: Callable[[bool, Problem], Run], names: tuple[str, str]
) -> tuple[Contestant[Problem], ...]:
    """A way without and with vectorization."""
    return tuple(Contestant(name, family, partial(way, n == 1)) for n, name in enumerate(names))


LOOPED = _either(
    "autograd",
    contestants.by_autograd_functional_looped,
    ("autograd.functional, looped", "autograd.functional vectorized, looped"),
)

PARAMS: tuple[Contestant[Problem], ...] = (
    *_ours(STRATEGIES | {"structured": "structured"}),
    Contestant(FLAT, "jacfunc", partial(by_jacfunc, strategy="auto", flat=True)),
    Contestant(REUSED, "jacfunc", by_reusing),
    Contestant(RECIPE, "torch.func", partial(contestants.by_recipe, jacrev)),
    Contestant(CONCATENATED, "torch.func", contestants.by_recipe_and_concatenation),
    Contestant(WHOLE_BATCH, "torch.func", contestants.by_whole_batch),
    *LOOPED,
    Contestant("backward, looped", "autograd", contestants.by_backward_loop),
    Contestant(LAPLACE, "rival", rivals.by_laplace),
    Contestant("Opacus", "rival", rivals.by_opacus),
    Contestant("BackPACK", "rival", rivals.by_backpack),
    Contestant(TORCHJD, "rival", rivals.by_torchjd),
    Contestant("TorchJD, looped", "rival", rivals.by_torchjd_looped),
)

INPUTS: tuple[Contestant[Problem], ...] = (
    *_ours(STRATEGIES | {"forward": "forward"}),
    Contestant(RECIPE, "torch.func", partial(contestants.by_recipe, jacrev)),
    Contestant("vmap(jacfwd)", "torch.func", partial(contestants.by_recipe, jacfwd)),
    *LOOPED,
    *_either(
        "autograd",
        contestants.by_autograd_functional_of_sum,
        ("autograd.functional of the sum", "autograd.functional vectorized, of the sum"),
    ),
    Contestant(
        "backward, looped over classes", "autograd", contestants.by_backward_loop_over_classes
    ),
    Contestant("expand and backward once", "autograd", contestants.by_expansion),
)

WHOLE: tuple[Contestant[Problem], ...] = (
    *(
        Contestant(
            f"jacfunc {name}",
            "jacfunc",
            partial(by_jacfunc, per_sample=False, strategy=strategy),
            forecast=partial(forecast, strategy),
        )
        for name, strategy in (STRATEGIES | {"structured": "structured"}).items()
    ),
    Contestant(FLAT, "jacfunc", by_jacfunc_as_matrix),
    Contestant(ONE_CALL, "torch.func", contestants.by_jacrev),
    Contestant("jacrev + cat", "torch.func", contestants.by_jacrev_and_concatenation),
    *_either(
        "autograd",
        contestants.by_autograd_functional,
        ("autograd.functional", "autograd.functional vectorized"),
    ),
    Contestant("backward, looped", "autograd", contestants.by_backward_loop),
    Contestant(LAPLACE, "rival", rivals.by_laplace),
    Contestant(TORCHJD, "rival", rivals.by_torchjd),
)


def _without(
    everyone: tuple[Contestant[Problem], ...], absent: Sequence[str]
) -> tuple[Contestant[Problem], ...]:
    return tuple(contestant for contestant in everyone if contestant.name not in absent)


def _of_params(network: str, batch: int) -> Case:
    """With many samples, whoever sweeps a whole batch takes up to minutes a call."""
    absent = (WHOLE_BATCH, TORCHJD) if network in WANTED else (WHOLE_BATCH, TORCHJD, LAPLACE)
    wanted = [Wanted(OURS, "time ÷", 1.0, (RECIPE,))]
    wanted.append(Wanted(FLAT, "time ÷", 1.0, (CONCATENATED,)))
    wanted.append(Wanted(FLAT, "peak ÷", 0.6, (CONCATENATED,)))
    if batch == MANY:
        wanted += [Wanted(n, "times faster than", 10.0, (LAPLACE,)) for n in (FLAT, REUSED)]
    return case_of(
        network,
        batch,
        _without(PARAMS, absent if batch == MANY else ()),
        baseline=RECIPE,
        effort=EFFORT,
        wanted=tuple(wanted) if network in WANTED else (),
        is_quick=batch == FEW and network in ("mlp", "cnn"),
    )


def _of_inputs(network: str, batch: int) -> Case:
    absent = () if batch <= PIXELWISE.get(network, 0) else FORWARD
    return case_of(
        network,
        batch,
        _without(INPUTS, absent),
        wrt="inputs",
        baseline=RECIPE,
        effort=EFFORT,
        is_quick=batch == FEW and network == "resnet",
    )


QUESTIONS = (
    Question(
        "params",
        "Per-sample Jacobians in the parameters of a network: by which way, by which library?",
        OURS,
        tuple(_of_params(network, batch) for network in COMPARED for batch in (FEW, MANY)),
    ),
    Question(
        "inputs",
        "Per-sample Jacobians in the inputs of a network: by which way?",
        OURS,
        tuple(_of_inputs(network, batch) for network in COMPARED for batch in (FEW, MANY)),
    ),
    Question(
        "whole",
        "The Jacobian of one call of a network in its parameters: by which way, by which library?",
        OURS,
        tuple(case_of(n, 1, WHOLE, baseline=ONE_CALL, effort=EFFORT) for n in COMPARED),
    ),
)
