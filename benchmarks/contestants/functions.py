"""Who takes Jacobians and Hessians of functions of one tensor: jacfunc, torch, autograd and JAX."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

import jacfunc
from benchmarks.cases import Case
from benchmarks.problems.formulas import drawing
from benchmarks.problems.functions import Function, FunctionAtPoints, judging, set_up
from benchmarks.problems.judge import Func, looped, looped_twice
from jacfunc import Strategy
from jacfunc._measuring import Contestant, Effort, Run

Way = Callable[
    [FunctionAtPoints], Func
]  # does once what a user would; what it returns takes a point
Forecast = tuple[float | None, int | None]  # seconds and peak bytes of a call that jacfunc expects
EFFORT = Effort(rounds=40, seconds=0.4, fewest=5, patience=0.4)
AUTO, BASELINE = "jacfunc auto", "torch.func jacrev"
BY_HAND = ("jacfunc reverse", "jacfunc forward", "jacfunc looped")
HESSIAN, HESSIAN_BASELINE = "jacfunc hessian", "torch.func hessian"


def at_each(compute: Func, points: tuple[Any, ...]) -> Run:
    """A run that takes every point in turn; the answer is the last one's."""
    # plans, compilation and imports that torch puts off come with the first call and are kept
    compute(points[0])

    def run() -> Any:
        for point in points:
            answer = compute(point)
        return answer

    return run


def by_expanding(problem: FunctionAtPoints) -> Func:
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


def in_jax(derive: Callable[[Any], Any], problem: FunctionAtPoints) -> Run:
    """The function in JAX's words, compiled beforehand; a call ends when it is computed."""
    if problem.x.is_cuda:
        raise NotImplementedError("JAX takes part on the CPU alone")
    if problem.function.in_jax is None:
        raise NotImplementedError("not written in JAX")
    import jax
    import jax.numpy as jnp

    if problem.x.dtype == torch.float64:
        jax.config.update("jax_enable_x64", True)
    draw = drawing(problem.x.dtype)
    func, _ = problem.function.in_jax(lambda *shape: jnp.asarray(draw(*shape).numpy()), jnp)
    compiled = jax.jit(derive(jax)(func))
    points = tuple(jnp.asarray(point.numpy()) for point in problem.points)
    return at_each(lambda x: compiled(x).block_until_ready(), points)


def plain(name: str, family: str, way: Way, forecast: Any = None) -> Contestant[FunctionAtPoints]:
    """One that is written with torch, whoever does the work."""
    prepare = lambda problem: at_each(way(problem), problem.points)  # noqa: E731
    return Contestant(name, family, prepare, forecast=forecast)


def functional(name: str, vectorize: bool) -> Contestant[FunctionAtPoints]:
    derive = getattr(torch.autograd.functional, name)
    label = f"autograd.functional {name}, {'' if vectorize else 'not '}vectorized"
    return plain(label, "autograd", lambda p: partial(derive, p.func, vectorize=vectorize))


def jax(transform: str) -> Contestant[FunctionAtPoints]:
    prepare = partial(in_jax, attrgetter(transform))
    return Contestant(f"JAX {transform}", "JAX", prepare, counted=False)


def estimated(strategy: str, problem: FunctionAtPoints) -> Forecast:
    """What jacfunc's estimate says of a strategy."""
    row = problem.costs[strategy]
    return row.seconds, row.peak_bytes


def planned(problem: FunctionAtPoints) -> Forecast:
    """What auto's plan says; where it had no choice, it forecast no seconds to choose by."""
    plan = jacfunc.plan(problem.func, problem.x)
    forecast = plan.forecast
    seconds = forecast.seconds if plan.seconds is None and forecast else plan.seconds
    return seconds, forecast.peak_bytes if forecast else None


def ours(name: str, strategy: str | Strategy, forecast: Any = None) -> Contestant[FunctionAtPoints]:
    way = lambda problem: jacfunc.jacobian(problem.func, strategy=strategy)  # noqa: E731
    return plain(name, "jacfunc", way, forecast)


JACOBIANS: tuple[Contestant[FunctionAtPoints], ...] = (
    ours("jacfunc reverse", "reverse", partial(estimated, "reverse")),
    ours("jacfunc forward", "forward", partial(estimated, "forward")),
    ours("jacfunc looped", jacfunc.Looped("rows"), partial(estimated, "looped")),
    ours("jacfunc reverse in chunks of 128", jacfunc.Reverse(128)),
    ours(AUTO, "auto", planned),
    ours("jacfunc autotune", "autotune"),
    plain(BASELINE, "torch.func", lambda problem: torch.func.jacrev(problem.func)),
    plain("torch.func jacfwd", "torch.func", lambda problem: torch.func.jacfwd(problem.func)),
    functional("jacobian", vectorize=True),
    functional("jacobian", vectorize=False),
    plain("autograd looped by hand", "autograd", lambda problem: partial(looped, problem.func)),
    plain("autograd expanded, backward once", "autograd", by_expanding),
    jax("jacrev"),
    jax("jacfwd"),
)


def nested(name: str, outer: Any, inner: Any) -> Contestant[FunctionAtPoints]:
    """A Jacobian of a Jacobian."""
    return plain(name, name.split()[0], lambda problem: outer(inner(problem.func)))


HESSIANS: tuple[Contestant[FunctionAtPoints], ...] = (
    plain(HESSIAN, "jacfunc", lambda problem: jacfunc.hessian(problem.func, strategy="auto")),
    nested("jacfunc jacfwd of jacrev", jacfunc.jacfwd, jacfunc.jacrev),
    nested("jacfunc jacrev of jacrev", jacfunc.jacrev, jacfunc.jacrev),
    plain(HESSIAN_BASELINE, "torch.func", lambda problem: torch.func.hessian(problem.func)),
    nested("torch.func jacrev of jacrev", torch.func.jacrev, torch.func.jacrev),
    functional("hessian", vectorize=True),
    functional("hessian", vectorize=False),
    plain("double backward by hand", "autograd", lambda p: partial(looped_twice, p.func)),
    jax("hessian"),
)


def case(
    name: str,
    function: Function,
    sizes: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    contestants: tuple[Contestant[FunctionAtPoints], ...] = JACOBIANS,
    baseline: str = BASELINE,
    derivative: Callable[[Func, Tensor], Tensor] = looped,
    **options: Any,
) -> Case:
    """A function whose derivative is taken at so many points as there are ``calls``."""
    name = name if dtype == torch.float32 else f"{name}, float64"
    setup = partial(set_up, function, dtype, sizes.get("calls", 1))
    precision, options = str(dtype).removeprefix("torch."), {"effort": EFFORT, **options}
    check = partial(judging, derivative)
    return Case(name, setup, contestants, check, baseline, precision, sizes, **options)
