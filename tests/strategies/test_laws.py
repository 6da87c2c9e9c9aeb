"""The laws of ``tests/truth/laws.py`` over the table of problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jacfunc
from tests.kinds.problems import PROBLEMS, Problem
from tests.truth.laws import (
    Snapshot,
    adjoint_identity,
    assert_commutes_with_vmap,
    combine,
    contract,
    directions,
    inner,
    moved,
)
from tests.truth.oracles import (
    assert_same,
    float_leaves,
    is_real_tensor,
    on_picked,
    picked,
    tree_map,
)
from tests.truth.reference import (
    PUSHING,
    STRATEGIES,
    reference_hessian,
    reference_jacobian,
    tolerance,
)

EVERY = [pytest.param(problem, id=problem.name) for problem in PROBLEMS]
PUSHED = [pytest.param(p, id=p.name) for p in PROBLEMS if p.forward_refuses is None]
# vmap(func) itself fails for these, whoever differentiates
MAPPED = [pytest.param(p, id=p.name) for p in PROBLEMS if "no_vmap" not in p.stress]


def at(problem: Problem, device: str) -> tuple:
    """The problem as a function of one tree, and the point."""
    args = problem.make_args(device, torch.float64)
    func = on_picked(problem.func, args, problem.argnums, problem.kwargs)
    return func, picked(args, problem.argnums)


@pytest.mark.parametrize("problem", PUSHED)
def test_pushforward_and_pullback_are_adjoint(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    pushed, pulled = adjoint_identity(func, point)
    torch.testing.assert_close(pushed, pulled, **tolerance((point, func(moved(point, 1.0)))))


@pytest.mark.parametrize("problem", PUSHED)
def test_pushforward_is_the_product_with_the_reference(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    tangents = directions(point, 3)
    output, pushed = jacfunc.jvp(func, (point,), (tangents,))
    assert_same(output, func(moved(point, 1.0)), **tolerance((point, output)))
    jacobian = reference_jacobian(problem.name, device)
    assert_same(pushed, contract(jacobian, tangents, output), **tolerance((point, output)))


@pytest.mark.parametrize("problem", EVERY)
def test_pullback_is_the_transposed_product(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    output, pullback = jacfunc.vjp(func, point)
    cotangents, tangents = directions(output, 4), directions(point, 5)
    (pulled,) = pullback(cotangents)
    product = contract(reference_jacobian(problem.name, device), tangents, output)
    torch.testing.assert_close(
        inner(pulled, tangents), inner(cotangents, product), **tolerance((point, output))
    )


@pytest.mark.parametrize("problem", EVERY)
def test_pullback_is_linear_and_may_be_called_again(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    output, pullback = jacfunc.vjp(func, point)
    first, second = directions(output, 6), directions(output, 7)
    (together,) = pullback(combine(2.0, first, -3.0, second))
    apart = combine(2.0, pullback(first)[0], -3.0, pullback(second)[0])
    assert_same(together, apart, **tolerance((point, output)))


@pytest.mark.parametrize("problem", PUSHED)
def test_pushforward_is_linear(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    first, second = directions(point, 8), directions(point, 9)
    output, together = jacfunc.jvp(func, (point,), (combine(2.0, first, -3.0, second),))
    apart = combine(
        2.0,
        jacfunc.jvp(func, (point,), (first,))[1],
        -3.0,
        jacfunc.jvp(func, (point,), (second,))[1],
    )
    assert_same(together, apart, **tolerance((point, output)))


@pytest.mark.parametrize("problem", MAPPED)
def test_jacrev_commutes_with_vmap(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    points = [moved(point, 1.0), moved(point, 0.9)]
    assert_commutes_with_vmap(jacfunc.jacrev, func, points)


@pytest.mark.parametrize("problem", [p for p in MAPPED if p in PUSHED])
def test_jacfwd_commutes_with_vmap(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    points = [moved(point, 1.0), moved(point, 0.9)]
    assert_commutes_with_vmap(jacfunc.jacfwd, func, points)


@pytest.mark.parametrize("problem", MAPPED)
def test_auto_commutes_with_vmap(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    points = [moved(point, 1.0), moved(point, 0.9)]
    assert_commutes_with_vmap(jacfunc.jacobian, func, points)


SMOOTH = [pytest.param(p, id=p.name) for p in PROBLEMS if "smooth" in p.stress]
SMOOTH_MAPPED = [
    pytest.param(p, id=p.name) for p in PROBLEMS if {"smooth"} == p.stress & {"smooth", "no_vmap"}
]
# torch's forward mode keeps their saved factors constant for an outer derivative
REFUSED_IF_DIFFERENTIATED = {
    "solve",
    "det",
    "batched_det",
    "slogdet",
}


def refuses_forward(problem: Problem) -> bool:
    """Forward mode inside another derivative is refused."""
    return problem.forward_refuses is not None or problem.name in REFUSED_IF_DIFFERENTIATED


@pytest.mark.parametrize("problem", SMOOTH_MAPPED)
def test_hessian_commutes_with_vmap(problem: Problem, device: str) -> None:
    func, point = at(problem, device)
    points = [moved(point, 1.0), moved(point, 0.9)]
    assert_commutes_with_vmap(jacfunc.hessian, func, points)


def squared_norm(jacobian: Any) -> torch.Tensor:
    return torch.stack([block.double().square().sum() for block in float_leaves(jacobian)]).sum()


def gradient_of_squared_norm(problem: Problem, device: str) -> list[torch.Tensor]:
    """2 Σ J_ij H_ijk over i and j, for each input leaf k, from the references."""
    blocks = float_leaves(reference_jacobian(problem.name, device))
    second = iter(float_leaves(reference_hessian(problem.name, device)))
    leaves = float_leaves(at(problem, device)[1])
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for block in blocks:
        for k in range(len(leaves)):
            sums[k] = sums[k] + 2 * torch.tensordot(block, next(second), block.dim())
    return sums


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
@pytest.mark.parametrize("problem", SMOOTH)
def test_a_jacobian_inside_a_loss_has_the_right_gradient(
    problem: Problem, strategy: str, device: str
) -> None:
    func, point = at(problem, device)
    leaves = [leaf.clone().requires_grad_() for leaf in float_leaves(point)]
    fresh = iter(leaves)
    tracked = tree_map(lambda x: next(fresh) if is_real_tensor(x) else x, point)
    derive = jacfunc.jacobian(func, strategy=strategy)
    if strategy == "forward" and refuses_forward(problem):
        with pytest.raises(NotImplementedError, match=r"is wrong here|no forward mode"):
            derive(tracked)
        return
    loss = squared_norm(derive(tracked))
    want = gradient_of_squared_norm(problem, device)
    if not loss.requires_grad:  # a linear function: its Jacobian is constant
        assert all(not gradient.any() for gradient in want)
        return
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    filled = [zero if each is None else each for each, zero in zip(got, zeros, strict=True)]
    assert_same(filled, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
@pytest.mark.parametrize("problem", SMOOTH_MAPPED)
def test_torchs_grad_of_a_jacobian_is_right(problem: Problem, strategy: str, device: str) -> None:
    func, point = at(problem, device)
    leaves = tuple(leaf.clone() for leaf in float_leaves(point))
    derive = jacfunc.jacobian(func, strategy=strategy)

    def loss(*inner: torch.Tensor) -> torch.Tensor:
        fresh = iter(inner)
        inside = tree_map(lambda x: next(fresh) if is_real_tensor(x) else x, point)
        return squared_norm(derive(inside))

    transform = torch.func.grad(loss, tuple(range(len(leaves))))
    if strategy == "forward" and refuses_forward(problem):
        with pytest.raises(NotImplementedError, match=r"is wrong here|no forward mode"):
            transform(*leaves)
        return
    want = gradient_of_squared_norm(problem, device)
    assert_same(list(transform(*leaves)), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("problem", EVERY)
def test_arguments_stay_as_they_were(problem: Problem, strategy: str, device: str) -> None:
    if problem.forward_refuses is not None and strategy in PUSHING:
        strategy = "auto"  # a refusal computes nothing; auto comes to the same through it
    args = problem.make_args(device, torch.float64)
    before = Snapshot((args, dict(problem.kwargs)))
    random_state = torch.get_rng_state()
    derive = jacfunc.jacobian(problem.func, problem.argnums, strategy=STRATEGIES[strategy])
    derive(*args, **problem.kwargs)
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
@pytest.mark.parametrize("problem", PUSHED)
def test_arguments_that_require_grad_stay_as_they_were(
    problem: Problem, strategy: str, device: str
) -> None:
    args = problem.make_args(device, torch.float64)
    leaves = float_leaves(picked(args, problem.argnums))
    for leaf in leaves:
        leaf.requires_grad_()
    before = Snapshot(args)
    derive = jacfunc.jacobian(problem.func, problem.argnums, strategy=strategy)
    if strategy == "forward" and refuses_forward(problem):
        with pytest.raises(NotImplementedError, match="saved factors or statistics"):
            derive(*args, **problem.kwargs)
    else:
        derive(*args, **problem.kwargs)
    before.assert_unchanged()
