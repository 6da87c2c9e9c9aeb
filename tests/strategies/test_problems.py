"""Every strategy on every problem gives the reference: tree, shapes, dtypes and values."""

from __future__ import annotations

import pytest
import torch

import jacfunc
from tests.kinds.problems import PROBLEMS, STRESSES, Problem
from tests.truth.oracles import (
    assert_same,
    finite_differences,
    float_leaves,
    looped_jacobian,
    on_picked,
    picked,
    tree_map,
)
from tests.truth.reference import (
    PUSHING,
    STRATEGIES,
    promoted,
    reference_hessian,
    reference_jacobian,
    tolerance,
)

DTYPES = [torch.float64, torch.float32]


def cases(*, having: str = "", lacking: str = "") -> pytest.MarkDecorator:
    chosen = [
        problem
        for problem in PROBLEMS
        if set(having.split()) <= problem.stress and not set(lacking.split()) & problem.stress
    ]
    assert chosen
    return pytest.mark.parametrize("problem", chosen, ids=lambda problem: problem.name)


def copied(args: tuple) -> tuple:
    """Of its own memory, as some problems write into their input."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@cases()
def test_every_strategy_gives_the_reference(
    problem: Problem, strategy: str, dtype: torch.dtype, device: str
) -> None:
    args = problem.make_args(device, dtype)
    derive = jacfunc.jacobian(problem.func, problem.argnums, strategy=STRATEGIES[strategy])
    if problem.forward_refuses is not None and strategy in PUSHING:
        with pytest.raises(NotImplementedError, match=problem.forward_refuses):
            derive(*args, **problem.kwargs)
        return
    result = derive(*args, **problem.kwargs)
    output = problem.func(*copied(args), **problem.kwargs)
    chosen = picked(args, problem.argnums)
    want = promoted(reference_jacobian(problem.name, device), output, chosen)
    assert_same(result, want, **tolerance(args, output))
    assert not any(block.requires_grad for block in float_leaves(result))


@cases()
def test_value_comes_from_the_same_evaluation(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    derive = jacfunc.value_and_jacobian(problem.func, problem.argnums)
    value, jacobian = derive(*args, **problem.kwargs)
    assert_same(value, problem.func(*copied(args), **problem.kwargs))
    assert_same(jacobian, jacfunc.jacobian(problem.func, problem.argnums)(*args, **problem.kwargs))


@cases(having="differences")
def test_reference_agrees_with_finite_differences(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    differences = finite_differences(problem.func, args, problem.argnums, problem.kwargs)
    assert_same(reference_jacobian(problem.name, device), differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.jacobian], ids=lambda p: p.name)
def test_closed_form_agrees_with_the_looped_oracle(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    looped = looped_jacobian(problem.func, args, problem.argnums, problem.kwargs)
    assert_same(problem.jacobian(*args), looped)


def assert_same_as_torch(got: object, theirs: object) -> None:
    """Blocks in the same order; torch's trees and dtypes differ from ours on purpose."""
    ours, blocks = float_leaves(got), float_leaves(theirs)
    assert len(ours) == len(blocks)
    for a, b in zip(ours, blocks, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance((a, b)))


@cases(lacking="torch_jacrev")
def test_same_as_torch_jacrev(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    theirs = torch.func.jacrev(problem.func, problem.argnums)(*args)
    assert_same_as_torch(jacfunc.jacrev(problem.func, problem.argnums)(*args), theirs)


@cases(lacking="torch_jacfwd")
def test_same_as_torch_jacfwd(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    theirs = torch.func.jacfwd(problem.func, problem.argnums)(*args)
    assert_same_as_torch(jacfunc.jacfwd(problem.func, problem.argnums)(*args), theirs)


@cases(lacking="torch_hessian", having="smooth")
def test_same_as_torch_hessian(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    theirs = torch.func.hessian(problem.func, problem.argnums)(*args)
    assert_same_as_torch(jacfunc.hessian(problem.func, problem.argnums)(*args), theirs)


@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
@cases(having="smooth")
def test_hessian(problem: Problem, strategy: str, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    result = jacfunc.hessian(problem.func, problem.argnums, strategy=strategy)(*args)
    assert_same(result, reference_hessian(problem.name, device), rtol=1e-8, atol=1e-8)


@cases(having="smooth")
def test_hessian_forward_over_reverse(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    derive = jacfunc.hessian(problem.func, problem.argnums, strategy="forward")
    if "hessian_forward_refuses" in problem.stress:
        with pytest.raises(NotImplementedError):
            derive(*args)
        return
    assert_same(derive(*args), reference_hessian(problem.name, device), rtol=1e-8, atol=1e-8)


@cases(having="smooth")
def test_hessian_is_symmetric(problem: Problem, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    chosen = picked(args, problem.argnums)
    sizes = [leaf.numel() for leaf in float_leaves(chosen)]
    of_picked = on_picked(problem.func, args, problem.argnums, problem.kwargs)
    blocks = iter(float_leaves(jacfunc.hessian(of_picked)(chosen)))
    for out in float_leaves(of_picked(copied((chosen,))[0])):
        rows = [
            torch.cat([next(blocks).reshape(out.numel(), m, n) for n in sizes], 2) for m in sizes
        ]
        matrix = torch.cat(rows, 1)
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-8, atol=1e-8)


def test_the_table_is_large_and_exercises_every_stress() -> None:
    assert len(PROBLEMS) >= 45
    assert set().union(*(problem.stress for problem in PROBLEMS)) == STRESSES.keys()
