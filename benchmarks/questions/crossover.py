"""Functions of one tensor: reverse, forward or a loop, by jacfunc, torch, autograd and JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import jacfunc
from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.functions import (
    DOUBLE,
    SINGLE,
    Func,
    Function,
    Problem,
    by_expanding,
    functional,
    in_torch,
    jax,
    judging,
    looped,
    plain,
    set_up,
)
from benchmarks.problems import formulas
from jacfunc import Strategy
from jacfunc._measuring.results import Expected
from jacfunc._measuring.rounds import Contestant, Effort

AUTO, BASELINE = "jacfunc auto", "torch.func jacrev"
BY_HAND = ("jacfunc reverse", "jacfunc forward", "jacfunc looped")
EFFORT = Effort(rounds=40, seconds=0.4, fewest=5, patience=0.4)


# --- who takes part ---


def estimated(strategy: str, problem: Problem) -> Expected:
    row = problem.costs[strategy]
    return Expected(row.seconds, row.peak_bytes)


def planned(problem: Problem) -> Expected:
    """What auto's plan says; where it had no choice, it forecast no seconds to choose by."""
    plan = jacfunc.plan(problem.func, problem.x)
    foretold = plan.forecast
    seconds = foretold.seconds if plan.seconds is None and foretold else plan.seconds
    return Expected(seconds, foretold.peak_bytes if foretold else None)


def ours(name: str, strategy: str | Strategy, forecast: Any = None) -> Contestant[Problem]:
    prepare = partial(in_torch, lambda problem: jacfunc.jacobian(problem.func, strategy=strategy))
    return Contestant(name, "jacfunc", prepare, forecast=forecast)


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    ours("jacfunc reverse", "reverse", partial(estimated, "reverse")),
    ours("jacfunc forward", "forward", partial(estimated, "forward")),
    ours("jacfunc looped", jacfunc.Looped("rows"), partial(estimated, "looped")),
    ours("jacfunc reverse in chunks of 128", jacfunc.Reverse(128)),
    ours(AUTO, "auto", planned),
    ours("jacfunc autotune", "autotune"),
    plain(BASELINE, "torch.func", lambda problem: torch.func.jacrev(problem.func)),
    plain("torch.func jacfwd", "torch.func", lambda problem: torch.func.jacfwd(problem.func)),
    functional("jacobian", vectorize=True),
    functional("jacobian"),
    plain("autograd looped by hand", "autograd", lambda problem: partial(looped, problem.func)),
    plain("autograd expanded, backward once", "autograd", by_expanding),
    jax("jacrev"),
    jax("jacfwd"),
)


# --- the cases ---


def mlp(inputs: int, outputs: int, width: int) -> Function:
    make = partial(formulas.mlp, inputs, outputs, width)

    def batched(draw: Any) -> Func:
        first, second, last = (w.T for w in formulas.mlp_weights(inputs, outputs, width, draw))
        return lambda x: torch.tanh(torch.tanh(x @ first) @ second) @ last

    return Function(make, batched, in_jax=make)


def portable(make: Any) -> Function:
    """Made by the same words from torch's numbers and from JAX's."""
    return Function(make, in_jax=make)


MAPS: tuple[tuple[str, int, int, Function], ...] = (
    ("stencil, 256 → 256", 256, 256, Function(partial(formulas.stencil, 256))),
    ("stencil, 2048 → 2048", 2048, 2048, Function(partial(formulas.stencil, 2048))),
    ("heat, 8² → 8²", 64, 64, Function(partial(formulas.heat, 8))),
    ("heat, 32² → 32²", 1024, 1024, Function(partial(formulas.heat, 32))),
    ("orbit, 4 → 4, 20 steps", 4, 4, portable(partial(formulas.orbit, 20))),
    ("attention, 4 × 8 → 4 × 8", 32, 32, Function(partial(formulas.attention, 4, 8))),
    ("attention, 16 × 32 → 16 × 32", 512, 512, Function(partial(formulas.attention, 16, 32))),
    ("cnn, 16² → 16²", 256, 256, Function(partial(formulas.image_to_image, 16, 4))),
    ("cnn, 32² → 10", 1024, 10, Function(partial(formulas.classifier, 32))),
    ("energy, 4096 → 1", 4096, 1, portable(partial(formulas.energy, 4096))),
    ("curve, 1 → 4096", 1, 4096, portable(partial(formulas.curve, 4096))),
)
SIDES = (4, 16, 64, 256, 1024)
CROSSOVERS = ((64, SINGLE, SIDES), (64, DOUBLE, (16, 256)), (512, SINGLE, (16, 256, 1024)))
"""Widths of perceptrons, and how many inputs and outputs they have."""

QUICK = ((64, 64), (16, 256), (256, 16))
"""Perceptrons of the quick suite."""


def case(
    name: str,
    function: Function,
    dtype: torch.dtype = SINGLE,
    calls: int = 1,
    derivative: Callable[[Func, Tensor], Tensor] = looped,
    effort: Effort = EFFORT,
    **rest: Any,
) -> Case:
    """A function whose derivative is taken at so many points; ``rest`` is passed on."""
    return Case(
        name if dtype == SINGLE else f"{name}, float64",
        setup=partial(set_up, function, dtype, calls),
        check=partial(judging, derivative),
        dtype=str(dtype).removeprefix("torch."),
        effort=effort,
        **rest,
    )


jacobian = partial(
    case,
    contestants=CONTESTANTS,
    baseline=BASELINE,
    wanted=(Wanted(AUTO, "time ÷", 1.10, BY_HAND),),
)


def crossover() -> Iterator[Case]:
    """Perceptrons of all shapes; some in float64, some wider."""
    for width, dtype, sides in CROSSOVERS:
        for inputs, outputs in product(sides, sides):
            yield jacobian(
                f"mlp {width}, {inputs} → {outputs}",
                mlp(inputs, outputs, width),
                dtype,
                sizes={"inputs": inputs, "outputs": outputs, "width": width},
                is_quick=(width, dtype) == (64, SINGLE) and (inputs, outputs) in QUICK,
            )


def fields() -> Iterator[Case]:
    """What is not a perceptron; stencils in float64, too."""
    for name, inputs, outputs, function in MAPS:
        for dtype in (SINGLE, DOUBLE) if name.startswith("stencil") else (SINGLE,):
            yield jacobian(
                name,
                function,
                dtype,
                sizes={"inputs": inputs, "outputs": outputs},
                is_quick=(name, dtype) == (MAPS[0][0], SINGLE),
            )


CROSSOVER = Question(
    "crossover",
    "Reverse, forward or a loop, for a function of N inputs and M outputs?",
    AUTO,
    tuple(crossover()),
)
FIELDS = Question(
    "fields",
    "Which way for maps that are as large out as in, and for programs of many small steps?",
    AUTO,
    tuple(fields()),
)
QUESTIONS = (CROSSOVER, FIELDS)
