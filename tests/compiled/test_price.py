"""What compiling costs and saves, before and after; plans that compile; what a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc.testing import known_machine
from tests.conftest import DEVICE

X = torch.tensor([0.3, -0.5, 0.7])
XS = torch.stack([X, 2 * X, X.cos()])


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def func(x: Tensor) -> Tensor:
    return torch.stack([x.prod(), x.sin().sum()])


def square(x: Tensor) -> Tensor:
    return x.sin() * x.sum()


PLAN = jacfunc.compile(jacfunc.Plan(jacfunc.Reverse(), "it was asked for"), backend="replay")

# --- plans that compile ---

DOORS: dict[str, tuple[Callable[..., Any], Any]] = {
    "jacobian": (lambda **how: jacfunc.jacobian(func, **how), torch.func.jacrev(func)(X)),
    "value": (
        lambda **how: jacfunc.value_and_jacobian(func, **how),
        (func(X), torch.func.jacrev(func)(X)),
    ),
    "hessian": (
        lambda **how: jacfunc.hessian(func, **how),
        torch.func.jacfwd(torch.func.jacrev(func))(X),
    ),
    "divergence": (
        lambda **how: jacfunc.divergence(square, **how),
        torch.func.jacrev(square)(X).trace(),
    ),
    "module": (
        lambda **how: jacfunc.module_jacobian(module(), "inputs", **how),
        torch.func.jacrev(module())(X).detach(),
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_a_door_compiles_what_a_compiled_plan_is_for(name: str) -> None:
    door, want = DOORS[name]
    derive = door(strategy=PLAN)
    assert isinstance(derive, jacfunc.Compiled)
    for _ in range(2):
        torch.testing.assert_close(derive(X), want)
    assert len(derive.compilations) == 1


def test_plans_are_made_and_pinned_compiled() -> None:
    plan = jacfunc.compile(jacfunc.plan(func, X), backend="replay")
    again = jacfunc.plan(func, X, strategy=plan)
    assert again.compiler == plan.compiler
    assert again.forecast is not None
    assert "compiled" in repr(again)
    assert "'replay'" in repr(again)
    assert "before the first" not in repr(plan)  # that forecast is Inductor's
    assert "before the first" in repr(jacfunc.compile(plan))
    assert jacfunc.compile(plan).compiler != plan.compiler
    with pytest.raises(ValueError, match="compile: backend must be one of 'inductor'"):
        jacfunc.compile(plan, backend="fastest")  # type: ignore[call-overload]


def test_what_returns_no_derivative_compiles_none() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="strategy must be a plan that is not compiled, got one"):
        jacfunc.graph_jacobian(func(x), x, strategy=PLAN)


# --- the price, before and after ---


def test_the_price_is_forecast() -> None:
    weights = torch.randn(8, 3), torch.randn(200, 8)
    with known_machine():
        costs = jacfunc.estimate(lambda x: weights[1] @ torch.tanh(weights[0] @ x), X)
    reverse, forward, looped = (
        costs[name].compilation for name in ("reverse", "forward", "looped")
    )
    assert reverse is not None
    assert forward is not None
    assert looped is not None
    for each in (reverse, forward, looped):
        assert 0 < each.call_seconds < each.eager_seconds < each.build_seconds
        assert each.calls_to_repay == each.build_seconds / (each.eager_seconds - each.call_seconds)
    assert looped.operators > 50 * reverse.operators  # its 200 sweeps are written out
    assert looped.trace_seconds > 50 * reverse.trace_seconds
    assert costs["reverse"].seconds == reverse.eager_seconds
    first = costs.to_dicts()[0]
    assert first["compile_seconds"] == reverse.build_seconds
    assert first["compiled_seconds"] == reverse.call_seconds
    assert first["calls_to_repay"] == reverse.calls_to_repay
    assert {"compiled", "repaid"} <= {*repr(costs).split("\n")[1].split()}


def test_a_price_that_is_not_known_is_told_so() -> None:
    (row, *_) = jacfunc.estimate(torch.sin, torch.empty(3, device="meta"))
    assert row.compilation is None
    assert "?" in repr(jacfunc.estimate(torch.sin, torch.empty(3, device="meta")))
    price = jacfunc.Compilation(1.0, 2.0, eager_seconds=1e-3, call_seconds=1e-3, operators=1)
    assert price.calls_to_repay == float("inf")
    report = jacfunc.explain(func, X, strategy=jacfunc.Plan(jacfunc.Reverse(), "why"))
    assert "if compiled: " in repr(report)
    assert report.compilation is None


def test_explain_compares_the_price_with_the_forecast() -> None:
    report = jacfunc.explain(func, X, strategy=PLAN)
    paid = report.compilation
    assert paid is not None
    assert report.plan.forecast is not None
    assert report.plan.forecast.compilation is not None
    assert paid.build_seconds > 0
    assert report.peak_bytes == paid.peak_bytes
    lines = repr(report).split("\n")
    assert [line.split("  ")[1] for line in lines[1:]] == [
        *("peak", "a call", "before the first", "repaid after"),
    ]
    assert all(line.endswith(" seen") and " forecast " in line for line in lines[1:])
    assert "before the first" in report._repr_html_()


# --- what a compiled call takes ---


def test_the_bytes_of_a_call_are_counted() -> None:
    x = torch.randn(1000, device=DEVICE)
    compiled = jacfunc.compile(lambda x: x.sin() * x.cos(), backend="replay")
    compiled(x)
    (one,) = compiled.compilations
    assert one.peak_bytes == 3 * x.nbytes
    assert one.constant_bytes == 0
    jac = jacfunc.compile(jacfunc.jacfwd(torch.sin), backend="replay")
    jac(x)
    (one,) = jac.compilations
    assert one.peak_bytes is not None
    assert one.constant_bytes is not None
    assert one.peak_bytes + one.constant_bytes >= 1000 * x.nbytes


# --- random projections ---


@pytest.mark.parametrize("sizes", [{"size": 4}, {"per_module": (2, 3)}, {"size": 4, "seed": 5}])
def test_random_projections(sizes: dict[str, Any]) -> None:
    """Their signs are fixed by the seed: constants of the trace, which draws none."""
    model = module()
    project = jacfunc.random_projection(model, **sizes)
    compiled = jacfunc.compile(project, backend="replay")
    for factor in (1.0, 0.5):
        before = torch.random.get_rng_state()
        got = compiled(factor * XS)
        assert torch.equal(before, torch.random.get_rng_state())
        torch.testing.assert_close(got, project(factor * XS))
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.9)
    assert len(compiled.compilations) == 1


# --- nothing is done again that is the same at every call ---

FACTORIES = ("eye", "zeros", "ones", "arange", "full", "rand", "scalar_tensor")
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")
LOSS = nn.MSELoss()


def asked_of(model: nn.Module) -> dict[str, Callable[[Tensor], Any]]:
    frozen = module().requires_grad_(False)
    number = lambda x: frozen(x).square().sum()  # noqa: E731
    goals = torch.zeros(3, 2)
    v = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    return {
        "hvp": lambda x: jacfunc.hvp(number, (x,), (x,))[1],
        "vjp": lambda x: jacfunc.vjp(frozen, x)[1](frozen(x))[0],
        "laplacian": jacfunc.vmap(jacfunc.laplacian(number)),
        "linearize": lambda x: jacfunc.linearize(frozen, x)[1] @ x,
        "hessian operator": lambda x: jacfunc.hessian_operator(number, x)[1] @ x,
        "inputs": jacfunc.module_jacobian(model, "inputs", per_sample=True),
        "diagonal": lambda x: jacfunc.ggn(model, LOSS)(x, goals).diagonal(),
        "norms": lambda x: jacfunc.gradient_norms(model, LOSS)(x, goals),
        "module operator": lambda x: jacfunc.module_operator(model)(x) @ v,
        "module hessian": lambda x: jacfunc.module_hessian(model, LOSS)(x, goals) @ v,
        "projection": jacfunc.random_projection(model, 4),
    }


@pytest.mark.parametrize("name", asked_of(module()))
def test_no_seed_is_built_and_no_number_read(name: str) -> None:
    compiled = jacfunc.compile(asked_of(module())[name], backend="replay")
    compiled(XS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        compiled(2 * XS)
    events = [event for event in seen.events() if event.cpu_parent is None]
    names = [event.name.removeprefix("aten::").rstrip("_") for event in events]
    assert len(names) > 2
    made = [name for name in names if name.startswith(FACTORIES) or name.endswith("_like")]
    assert made == []
    assert not {*READS} & {event.name.removeprefix("aten::") for event in seen.events()}
