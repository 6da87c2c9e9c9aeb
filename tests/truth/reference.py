"""Reference derivatives of the problems, computed once a problem."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import jacfunc
from tests.kinds.problems import BY_NAME
from tests.truth.oracles import float_leaves, looped_hessian, looped_jacobian, place

STRATEGIES = {
    "reverse": "reverse",
    "reverse_by_1": jacfunc.Reverse(chunk_size=1),
    "reverse_by_3": jacfunc.Reverse(chunk_size=3),
    "forward": "forward",
    "forward_by_2": jacfunc.Forward(chunk_size=2),
    "looped": "looped",
    "looped_columns": jacfunc.Looped(over="columns"),
    "auto": "auto",
}
PUSHING = {"forward", "forward_by_2", "looped_columns"}


@cache
def reference_jacobian(name: str, device: str) -> Any:
    """The closed form where there is one, else the looped oracle, in float64."""
    problem = BY_NAME[name]
    args = problem.make_args(device, torch.float64)
    if problem.jacobian is not None:
        return problem.jacobian(*args)
    return looped_jacobian(problem.func, args, problem.argnums, problem.kwargs)


@cache
def reference_hessian(name: str, device: str) -> Any:
    problem = BY_NAME[name]
    args = problem.make_args(device, torch.float64)
    return looped_hessian(problem.func, args, problem.argnums, problem.kwargs)


def tolerance(*trees: Any, double: float = 1e-9, single: float = 2e-4) -> dict[str, float]:
    """Rounding of the coarsest dtype that took part."""
    leaves = [leaf for tree in trees for leaf in float_leaves(tree)]
    is_double = all(leaf.dtype == torch.float64 for leaf in leaves)
    return {"rtol": double, "atol": double / 10} if is_double else {"rtol": single, "atol": single}


def promoted(jacobian: Any, output: Any, chosen: Any) -> Any:
    """Blocks of a reference in the dtype of the contract: promote_types(out, in)."""
    ins, blocks = float_leaves(chosen), iter(float_leaves(jacobian))
    rows = [
        [next(blocks).to(torch.promote_types(out.dtype, leaf.dtype)) for leaf in ins]
        for out in float_leaves(output)
    ]
    return place(output, [place(chosen, row) for row in rows])
