"""Transforms inside each other, inside torch's, under autograd, under the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.problems import A54
from tests.truth.oracles import assert_same, looped_hessian, looped_jacobian
from tests.truth.reference import STRATEGIES

TORCH_OR_OURS = pytest.mark.parametrize(
    "vmap", [torch.func.vmap, jacfunc.vmap], ids=["torch", "ours"]
)
EVERY_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def f(x: Tensor) -> Tensor:
    return torch.tanh(A54(x) @ x) * x.sum()


def jacobian_of_f(x: Tensor) -> Tensor:
    y = torch.tanh(A54(x) @ x)
    return (1 - y**2)[:, None] * A54(x) * x.sum() + y[:, None]


def points(count: int = 3, device: str = "cpu") -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, device=device)


def loop(func: object, xs: Tensor) -> Tensor:
    return torch.stack([func(x) for x in xs])


# --- with vmap ---


@TORCH_OR_OURS
@EVERY_STRATEGY
def test_vmap_of_jacobian(vmap: object, strategy: object, device: str) -> None:
    xs = points(device=device)
    result = vmap(jacfunc.jacobian(f, strategy=strategy))(xs)
    assert_same(result, loop(jacobian_of_f, xs))


@TORCH_OR_OURS
def test_vmap_of_vmap_of_jacrev(vmap: object, device: str) -> None:
    xs = points(6, device).reshape(2, 3, 4)
    result = vmap(vmap(jacfunc.jacrev(f)))(xs)
    assert_same(result, torch.stack([loop(jacobian_of_f, x) for x in xs]))


@TORCH_OR_OURS
@EVERY_STRATEGY
def test_jacobian_of_vmap(vmap: object, strategy: object, device: str) -> None:
    xs = points(device=device)
    result = jacfunc.jacobian(vmap(f), strategy=strategy)(xs)
    want = torch.zeros(3, 5, 3, 4, dtype=torch.float64, device=device)
    for b in range(3):
        want[b, :, b] = jacobian_of_f(xs[b])
    assert_same(result, want)


@TORCH_OR_OURS
@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_vmap_of_hessian(vmap: object, strategy: str, device: str) -> None:
    xs = points(2, device)
    result = vmap(jacfunc.hessian(f, strategy=strategy))(xs)
    assert_same(result, torch.stack([looped_hessian(f, (x,)) for x in xs]))


# --- in each other ---

MODES = {"jacrev": jacfunc.jacrev, "jacfwd": jacfunc.jacfwd}


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", MODES)
def test_second_order(outer: str, inner: str, device: str) -> None:
    x = points(1, device)[0]
    result = MODES[outer](MODES[inner](f))(x)
    assert_same(result, looped_hessian(f, (x,)))


@pytest.mark.parametrize("inner", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("outer", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_in_every_other(outer: object, inner: object, device: str) -> None:
    x = points(1, device)[0]
    derive = jacfunc.jacobian(jacfunc.jacobian(f, strategy=inner), strategy=outer)
    assert_same(derive(x), looped_hessian(f, (x,)))


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("third", MODES)
def test_third_order(first: str, second: str, third: str, device: str) -> None:
    x = torch.randn(2, dtype=torch.float64, device=device)
    derive = MODES[third](MODES[second](MODES[first](lambda x: (x**3).sum())))
    want = torch.zeros(2, 2, 2, dtype=torch.float64, device=device)
    want[0, 0, 0] = want[1, 1, 1] = 6
    assert_same(derive(x), want)


@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("outer", MODES)
def test_ours_of_torchs(outer: str, inner: object, device: str) -> None:
    x = points(1, device)[0]
    assert_same(MODES[outer](inner(f))(x), looped_hessian(f, (x,)))


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
@EVERY_STRATEGY
def test_torchs_of_ours(outer: object, strategy: object, device: str) -> None:
    x = points(1, device)[0]
    result = outer(jacfunc.jacobian(f, strategy=strategy))(x)
    assert_same(result, looped_hessian(f, (x,)))


# --- in torch.func's grad, jvp and vjp ---


def penalty_gradient(x: Tensor) -> Tensor:
    """Gradient of ‖J(x)‖², from the oracles."""
    return 2 * torch.einsum("ij,ijk->k", jacobian_of_f(x), looped_hessian(f, (x,)))


@EVERY_STRATEGY
def test_torch_grad_through_a_jacobian(strategy: object, device: str) -> None:
    x = points(1, device)[0]
    derive = jacfunc.jacobian(f, strategy=strategy)
    result = torch.func.grad(lambda x: derive(x).square().sum())(x)
    assert_same(result, penalty_gradient(x))


@EVERY_STRATEGY
def test_torch_jvp_of_a_jacobian(strategy: object, device: str) -> None:
    x, v = points(2, device)
    value, pushed = torch.func.jvp(jacfunc.jacobian(f, strategy=strategy), (x,), (v,))
    assert_same(value, jacobian_of_f(x))
    assert_same(pushed, looped_hessian(f, (x,)) @ v)


@EVERY_STRATEGY
def test_torch_vjp_of_a_jacobian(strategy: object, device: str) -> None:
    x = points(1, device)[0]
    value, pullback = torch.func.vjp(jacfunc.jacobian(f, strategy=strategy), x)
    assert_same(pullback(2 * value)[0], penalty_gradient(x))


@EVERY_STRATEGY
def test_ours_of_jvp_and_vjp(strategy: object, device: str) -> None:
    x, v = points(2, device)
    hessian = looped_hessian(f, (x,))
    derive = jacfunc.jacobian(lambda x: jacfunc.jvp(f, (x,), (v,))[1], strategy=strategy)
    assert_same(derive(x), torch.einsum("ijk,j->ik", hessian, v))
    w = torch.ones(5, dtype=torch.float64, device=device)
    derive = jacfunc.jacobian(lambda x: jacfunc.vjp(f, x)[1](w)[0], strategy=strategy)
    assert_same(derive(x), hessian.sum(0))


@EVERY_STRATEGY
def test_per_sample_gradients_of_a_jacobian_penalty(strategy: object, device: str) -> None:
    xs = points(device=device)
    derive = jacfunc.jacobian(f, strategy=strategy)
    result = torch.func.vmap(torch.func.grad(lambda x: derive(x).square().sum()))(xs)
    assert_same(result, loop(penalty_gradient, xs))


# --- under plain autograd ---


@EVERY_STRATEGY
def test_backward_through_an_input_that_requires_grad(strategy: object, device: str) -> None:
    x = points(1, device)[0].requires_grad_()
    jacobian = jacfunc.jacobian(f, strategy=strategy)(x)
    assert jacobian.requires_grad
    (gradient,) = torch.autograd.grad(jacobian.square().sum(), x)
    assert_same(gradient, penalty_gradient(x.detach()))


@EVERY_STRATEGY
def test_backward_reaches_what_made_the_input(strategy: object, device: str) -> None:
    base = points(1, device)[0].requires_grad_()
    jacobian = jacfunc.jacobian(f, strategy=strategy)(base * 2)
    jacobian.square().sum().backward()
    assert_same(base.grad, 2 * penalty_gradient(2 * base.detach()))


@EVERY_STRATEGY
def test_training_on_closed_over_parameters(strategy: object, device: str) -> None:
    """The loss contains ∂ tanh(W x) / ∂ x; W is closed over and trained."""
    W = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(2, dtype=torch.float64, device=device)

    def loss_of(weight: Tensor) -> Tensor:
        return ((1 - torch.tanh(weight @ x) ** 2)[:, None] * weight).square().sum()

    jacobian = jacfunc.jacobian(lambda x: torch.tanh(W @ x), strategy=strategy)(x)
    jacobian.square().sum().backward()
    (want,) = torch.autograd.grad(loss_of(W), W)
    assert_same(W.grad, want)
    assert x.grad is None


@EVERY_STRATEGY
def test_training_step_of_a_module(strategy: object, device: str) -> None:
    """Parameter gradients of a Jacobian penalty against central differences."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double().to(device)
    x = torch.randn(2, dtype=torch.float64, device=device)

    def loss() -> Tensor:
        value, jacobian = jacfunc.value_and_jacobian(model, strategy=strategy)(x)
        return value.square().sum() + jacobian.square().sum()

    loss().backward()
    weight, step = model[0].weight, 1e-6
    differences = torch.zeros_like(weight)
    with torch.no_grad():
        for k in range(weight.numel()):
            entry = weight.view(-1)[k]
            entry += step
            above = loss()
            entry -= 2 * step
            below = loss()
            entry += step
            differences.view(-1)[k] = (above - below) / (2 * step)
    torch.testing.assert_close(weight.grad, differences, rtol=1e-6, atol=1e-7)
    assert all(
        parameter.grad is not None for parameter in model.parameters() if parameter.dim() > 1
    )


@EVERY_STRATEGY
def test_hessian_is_differentiable(strategy: object, device: str) -> None:
    x = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    hessian = jacfunc.hessian(lambda x: (x**3).sum(), strategy=strategy)(x)
    (gradient,) = torch.autograd.grad(hessian.sum(), x)
    assert_same(gradient, torch.full_like(gradient, 6.0))


@EVERY_STRATEGY
def test_detached_under_no_grad(strategy: object, device: str) -> None:
    x = points(1, device)[0].requires_grad_()
    with torch.no_grad():
        value, jacobian = jacfunc.value_and_jacobian(f, strategy=strategy)(x)
    assert not value.requires_grad
    assert not jacobian.requires_grad
    assert_same(jacobian, jacobian_of_f(x.detach()))


@EVERY_STRATEGY
def test_no_graph_is_kept_when_nothing_outside_requires_grad(strategy: object, device: str) -> None:
    x = points(1, device)[0]
    (value, aux), jacobian = jacfunc.value_and_jacobian(
        lambda x: (f(x), x * 2), strategy=strategy, has_aux=True
    )(x)
    for tensor in (value, aux, jacobian):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


@EVERY_STRATEGY
def test_works_in_inference_mode(strategy: object, device: str) -> None:
    outside = points(1, device)[0]
    with torch.inference_mode():
        inside = outside.clone()
        from_outside = jacfunc.jacobian(f, strategy=strategy)(outside)
        from_inside = jacfunc.jacobian(f, strategy=strategy)(inside)
    assert_same(from_outside.clone(), jacobian_of_f(outside))
    assert_same(from_inside.clone(), jacobian_of_f(outside))


def test_vjp_works_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        x = points(1, device)[0]
        value, pullback = jacfunc.vjp(f, x)
        (row,) = pullback(torch.ones_like(value))
    assert_same(row.clone(), jacobian_of_f(x.clone()).sum(0))


# --- aux and trees on the way ---


@EVERY_STRATEGY
def test_aux_is_any_object(strategy: object, device: str) -> None:
    x = points(1, device)[0]
    marker = object()
    derive = jacfunc.jacobian(
        lambda x: (f(x), {"marker": marker, "x": x * 2, "word": "aux"}),
        strategy=strategy,
        has_aux=True,
    )
    jacobian, aux = derive(x)
    assert aux["marker"] is marker
    assert aux["word"] == "aux"
    assert_same(aux["x"], x * 2)
    assert_same(jacobian, jacobian_of_f(x))


def test_aux_of_a_nested_jacobian(device: str) -> None:
    x = points(1, device)[0]
    hessian, aux = jacfunc.hessian(lambda x: (f(x), x.sum()), has_aux=True)(x)
    assert_same(hessian, looped_hessian(f, (x,)))
    assert_same(aux, x.sum())


# --- random functions ---


def drop(x: Tensor) -> Tensor:
    return torch.dropout(x, 0.5, train=True) * x


@EVERY_STRATEGY
def test_dropout_has_one_mask_in_value_and_jacobian(strategy: object, device: str) -> None:
    x = torch.arange(1.0, 65.0, dtype=torch.float64, device=device)
    value, jacobian = jacfunc.value_and_jacobian(drop, strategy=strategy)(x)
    assert_same(jacobian, torch.diag(2 * value / x))
    assert 0 < (value == 0).sum() < 64


def test_every_strategy_draws_the_same_mask(device: str) -> None:
    x = torch.ones(64, dtype=torch.float64, device=device)
    results = []
    for strategy in STRATEGIES.values():
        torch.manual_seed(5)
        results.append(jacfunc.jacobian(drop, strategy=strategy)(x))
        assert_same(results[-1], results[0])


def test_jacfwd_refuses_random_functions_by_default(device: str) -> None:
    with pytest.raises(RuntimeError, match="random"):
        jacfunc.jacfwd(drop)(torch.ones(4, device=device))


# --- under the compiler ---

COMPILED = {
    "jacrev": lambda x: jacfunc.jacrev(f)(x),
    "jacrev_by_2": lambda x: jacfunc.jacrev(f, chunk_size=2)(x),
    "jacfwd": lambda x: jacfunc.jacfwd(f)(x),
    "jacobian": lambda x: jacfunc.jacobian(f)(x),
    "hessian": lambda x: jacfunc.hessian(f)(x),
}


@pytest.mark.parametrize("name", COMPILED)
def test_traced_whole_by_the_compiler(name: str, device: str) -> None:
    torch.compiler.reset()
    x = points(1, device)[0]
    compiled = torch.compile(COMPILED[name], backend="eager", fullgraph=True)
    assert_same(compiled(x), COMPILED[name](x))


def test_vmapped_jacobian_traced_by_the_compiler(device: str) -> None:
    torch.compiler.reset()
    xs = points(device=device)
    compiled = torch.compile(
        lambda xs: torch.vmap(jacfunc.jacrev(f))(xs), backend="eager", fullgraph=True
    )
    assert_same(compiled(xs), loop(jacobian_of_f, xs))


def test_oracles_agree_on_the_function_used_here() -> None:
    x = points(1)[0]
    assert_same(jacobian_of_f(x), looped_jacobian(f, (x,)))
