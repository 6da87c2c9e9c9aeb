"""Functions of one tensor: reverse, forward or a loop, by jacfunc, torch, autograd and JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import jacfunc
from benchmarks import grid
from benchmarks.cases import Case, Question, Wanted
from benchmarks.reference import check
from jacfunc import Strategy
from jacfunc.compare._clock import Run
from jacfunc.compare._measuring import Check, Contestant, Effort
from jacfunc.compare._results import Forecast, WrongAnswerError

Func = Callable[[Any], Any]
CPU = torch.device("cpu")

AUTO, BASELINE = "jacfunc auto", "torch.func jacrev"
BY_HAND = ("jacfunc reverse", "jacfunc forward", "jacfunc looped")
SINGLE, DOUBLE = torch.float32, torch.float64
EFFORT = Effort(rounds=40, seconds=0.4, fewest=5, patience=0.4)
TOLERANCE = {SINGLE: 1e-4, DOUBLE: 1e-8}
"""Largest error of an answer, relative to the largest entry."""


@dataclass(frozen=True)
class Function:
    """How a function of one tensor and a point come from drawn numbers, in whose words.

    Args:
        make: from ``draw(*shape)``, the function and a point.
        batched: from the same numbers, the function of many points, the batch in front.
        in_jax: ``make`` that takes JAX's numbers and the module ``jax.numpy``.
    """

    make: Callable[[Any], tuple[Func, Tensor]]
    batched: Callable[[Any], Func] | None = None
    in_jax: Callable[[Any, Any], tuple[Func, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """A function on a device, and the points that one run takes its derivative at in turn."""

    function: Function
    func: Func
    points: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """The point whose derivative is the answer."""
        return self.points[-1]

    @cached_property
    def costs(self) -> jacfunc.Estimate:
        """What jacfunc says beforehand of every strategy."""
        return jacfunc.estimate(self.func, self.x)


Way = Callable[[Problem], Func]
"""Does once what a user would do once; what it returns takes a point."""


def set_up(function: Function, dtype: torch.dtype, calls: int, device: torch.device) -> Problem:
    """The same numbers every time."""
    draw = drawing(dtype, device)
    func, x = function.make(draw)
    return Problem(function, func, (x, *(draw(*x.shape) for _ in range(calls - 1))))


def drawing(dtype: torch.dtype, device: torch.device = CPU) -> Any:
    return grid.numbers(torch.Generator().manual_seed(0), device, dtype)


# --- the judge: the plainest loop there is, in float64, without jacfunc or torch.func ---


def looped(func: Func, x: Tensor) -> Tensor:
    """One ``autograd.grad`` an output, as in the answers of forums."""
    point = x.detach().requires_grad_()
    out = func(point)
    entries = out.flatten()
    rows = [
        torch.autograd.grad(entries[i], point, retain_graph=True)[0] for i in range(len(entries))
    ]
    return torch.stack(rows).view(*out.shape, *x.shape)


def judging(derivative: Callable[[Func, Tensor], Tensor], problem: Problem) -> Check:
    """What compares an answer with the derivative of the same function, taken in float64."""
    dtype = problem.x.dtype
    draw = drawing(dtype)
    # rounded as the problem's numbers are: the judge is asked about the same function
    func, _ = problem.function.make(lambda *shape: draw(*shape).double())
    expected = derivative(func, problem.x.to(CPU, DOUBLE))
    return partial(relative_error, expected, TOLERANCE[dtype])


def relative_error(expected: Tensor, tolerance: float, answer: Any) -> float:
    """Largest difference by the largest entry expected; JAX's answers are taken, too.

    Raises:
        WrongAnswerError: it is above the tolerance, or the shapes differ.
    """
    given = answer if isinstance(answer, Tensor) else from_dlpack(answer)
    error = check({"derivative": given}, {"derivative": expected})
    if error > tolerance:
        raise WrongAnswerError(f"relative error {error:.1e}")
    return error


# --- the ways ---


def by_expanding(problem: Problem) -> Func:
    """A copy of the point for each output, one batched evaluation, one backward."""
    if problem.function.batched is None:
        raise NotImplementedError("the function takes no batch")
    batched = problem.function.batched(drawing(problem.x.dtype, problem.x.device))
    shape = problem.func(problem.x).shape
    one_hot = torch.eye(shape.numel()).to(problem.x).view(-1, *shape)

    def compute(x: Tensor) -> Tensor:
        copies = x.detach().repeat(len(one_hot), *(1 for _ in x.shape)).requires_grad_()
        (rows,) = torch.autograd.grad(batched(copies), copies, one_hot)
        return rows.view(*shape, *x.shape)

    return compute


def in_torch(way: Way, problem: Problem) -> Run:
    return at_each(way(problem), problem.points)


def in_jax(transform: str, problem: Problem) -> Run:
    """The function in JAX's words, compiled beforehand; a call ends when it is computed."""
    if problem.x.is_cuda:
        raise NotImplementedError("JAX takes part on the CPU alone")
    if problem.function.in_jax is None:
        raise NotImplementedError("not written in JAX")
    import jax
    import jax.numpy as jnp

    dtype = problem.x.dtype
    if dtype == DOUBLE:
        jax.config.update("jax_enable_x64", True)
    draw = drawing(dtype)
    func, _ = problem.function.in_jax(lambda *shape: jnp.asarray(draw(*shape).numpy()), jnp)
    compiled = jax.jit(getattr(jax, transform)(func))
    points = tuple(jnp.asarray(point.numpy()) for point in problem.points)
    return at_each(lambda x: compiled(x).block_until_ready(), points)


def at_each(compute: Func, points: tuple[Any, ...]) -> Run:
    """Every point in turn; the answer is the last one's."""
    # plans, compilation and imports that torch puts off come with the first call and are kept
    compute(points[0])

    def run() -> Any:
        for point in points:
            answer = compute(point)
        return answer

    return run


# --- who takes part ---


def estimated(strategy: str, problem: Problem) -> Forecast:
    row = problem.costs[strategy]
    return Forecast(row.seconds, row.peak_bytes)


def planned(problem: Problem) -> Forecast:
    """What auto's plan says; where it had no choice, it forecast no seconds to choose by."""
    plan = jacfunc.plan(problem.func, problem.x)
    foretold = plan.forecast
    seconds = foretold.seconds if plan.seconds is None and foretold else plan.seconds
    return Forecast(seconds, foretold.peak_bytes if foretold else None)


def plain(name: str, family: str, way: Way) -> Contestant[Problem]:
    """One that is written with torch, whoever does the work."""
    return Contestant(name, family, partial(in_torch, way))


def ours(name: str, strategy: str | Strategy, forecast: Any = None) -> Contestant[Problem]:
    prepare = partial(in_torch, lambda problem: jacfunc.jacobian(problem.func, strategy=strategy))
    return Contestant(name, "jacfunc", prepare, forecast=forecast)


def functional(name: str, **options: Any) -> Contestant[Problem]:
    derive = getattr(torch.autograd.functional, name)
    how = "vectorized" if options.get("vectorize") else "not vectorized"
    label = f"autograd.functional {name}, {how}"
    return plain(label, "autograd", lambda problem: partial(derive, problem.func, **options))


def jax(transform: str) -> Contestant[Problem]:
    name = f"JAX {transform}"
    return Contestant(name, "JAX", partial(in_jax, transform), counted=False)


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
    make = partial(grid.mlp, inputs, outputs, width)

    def batched(draw: Any) -> Func:
        first, second, last = (w.T for w in grid.mlp_weights(inputs, outputs, width, draw))
        return lambda x: torch.tanh(torch.tanh(x @ first) @ second) @ last

    return Function(make, batched, in_jax=make)


def portable(make: Any) -> Function:
    """Made by the same words from torch's numbers and from JAX's."""
    return Function(make, in_jax=make)


MAPS: tuple[tuple[str, int, int, Function], ...] = (
    ("stencil, 256 → 256", 256, 256, Function(partial(grid.stencil, 256))),
    ("stencil, 2048 → 2048", 2048, 2048, Function(partial(grid.stencil, 2048))),
    ("heat, 8² → 8²", 64, 64, Function(partial(grid.heat, 8))),
    ("heat, 32² → 32²", 1024, 1024, Function(partial(grid.heat, 32))),
    ("orbit, 4 → 4, 20 steps", 4, 4, portable(partial(grid.orbit, 20))),
    ("attention, 4 × 8 → 4 × 8", 32, 32, Function(partial(grid.attention, 4, 8))),
    ("attention, 16 × 32 → 16 × 32", 512, 512, Function(partial(grid.attention, 16, 32))),
    ("cnn, 16² → 16²", 256, 256, Function(partial(grid.image_to_image, 16, 4))),
    ("cnn, 32² → 10", 1024, 10, Function(partial(grid.classifier, 32))),
    ("energy, 4096 → 1", 4096, 1, portable(partial(grid.energy, 4096))),
    ("curve, 1 → 4096", 1, 4096, portable(partial(grid.curve, 4096))),
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
