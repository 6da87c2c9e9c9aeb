"""Bad inputs of solves with linear operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import jacfunc
from jacfunc.operators import ConjugateGradient
from tests.kinds.bad_inputs import Bad

POINT = torch.tensor([0.3, -0.5, 0.7])


def wide(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.prod(), x.sin().sum()])


def linearized(func: Any = wide) -> jacfunc.LinearOperator:
    return jacfunc.linearize(func, POINT)[1]


def solved(*args: Any, func: Any = wide, **options: Any) -> Any:
    return linearized(func).solve(*args, **options)


TWO, THREE = torch.ones(2), torch.ones(3)
CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "a b of neither side": (
        partial(solved, torch.ones(4)),
        ValueError,
        r"b must be like products or like vectors, .* got \(4,\) of torch.float32",
    ),
    "a b in float64": (
        partial(solved, TWO.double(), side="rows"),
        TypeError,
        "b must match in dtype",
    ),
    "a b of the other side": (
        partial(solved, THREE, side="rows"),
        ValueError,
        "b must have 2 numbers in its first dimension",
    ),
    "a b of either side": (
        partial(solved, THREE, func=torch.sin),
        ValueError,
        "side must be said where b fits both, got 'auto'",
    ),
    "a side that there is not": (
        partial(solved, TWO, side="left"),
        ValueError,
        "side must be 'rows', 'columns' or 'both', got 'left'",
    ),
    "negative damping": (
        partial(solved, TWO, damping=-1e-3),
        ValueError,
        "damping must be a finite number from 0 on, got -0.001",
    ),
    "damping that is a tensor": (
        partial(solved, TWO, damping=torch.tensor(0.1)),
        ValueError,
        "damping must be a finite number from 0 on",
    ),
    "no damping on the larger side": (
        partial(solved, THREE),
        ValueError,
        "damping must be positive where b has more numbers than the other side, got 3 and 2",
    ),
    "no damping of a singular matrix": (
        partial(solved, TWO, func=lambda x: x.sum() * torch.ones(2)),
        ValueError,
        "the matrix plus damping must be positive definite beyond what rounding changes",
    ),
    "a solver by name": (
        partial(solved, TWO, solver="cholesky"),
        TypeError,
        r"solver must be Cholesky\(\) or ConjugateGradient\(\)",
    ),
    "too few iterations": (
        partial(solved, TWO, damping=1e-3, solver=ConjugateGradient(rtol=1e-6, maxiter=1)),
        RuntimeError,
        "the residual must fall to 1.0e-06 of b, got .* when products ran out",
    ),
    "a word for center": (
        partial(solved, TWO, damping=1.0, center="rows"),
        TypeError,
        "center must be True or False, got 'rows'",
    ),
    "a mean without samples": (
        lambda: linearized(torch.sum).lstsq(torch.tensor(1.0), damping=1.0, center=True),
        ValueError,
        "with center or per_sample products must have the samples in front",
    ),
    "a matrix that is not symmetric": (
        partial(solved, THREE, func=lambda x: x.cumsum(0), side="both"),
        ValueError,
        "side='both' takes a symmetric matrix",
    ),
    "a mean of a symmetric matrix": (
        partial(solved, THREE, func=torch.sin, side="both", center=True),
        ValueError,
        "center must be False where the matrix itself is solved, got True",
    ),
    "a b of vectors for least squares": (
        lambda: linearized().lstsq(THREE),
        ValueError,
        "b must have 2 numbers in its first dimension",
    ),
    "an inverse of no side": (
        lambda: linearized().inverse(side=None),
        ValueError,
        "side must be 'rows', 'columns' or 'both', got None",
    ),
    "an inverse of what is not square": (
        lambda: linearized().inverse(damping=1.0),
        ValueError,
        "two operators must agree on the vectors between them",
    ),
    "a dtype of integers": (
        lambda: linearized().gram(dtype=torch.int32),
        TypeError,
        "dtype must be a floating point dtype, got torch.int32",
    ),
    "a middle of the other side": (
        lambda: linearized().quad(TWO),
        ValueError,
        "middle must have 3 numbers in its first dimension",
    ),
    "an operator between other vectors": (
        lambda: linearized().quad(linearized()),
        ValueError,
        "two operators must agree on the vectors between them",
    ),
    "samples of outputs of two sizes": (
        lambda: linearized(lambda x: (x, x[:2])).quad(THREE, per_sample=True),
        ValueError,
        "with center or per_sample products must have the samples in front",
    ),
}

X = torch.ones(4, 3)
OF_MODULES: dict[str, tuple[Any, type[Exception], str]] = {
    "a b with too few samples": (
        lambda: jacfunc.module_operator(nn.Linear(3, 2), per_sample=True)(X).lstsq(X[:3, :2]),
        ValueError,
        "b must match in shape",
    ),
    "no damping of the same sample twice": (
        lambda: jacfunc.module_operator(nn.Linear(3, 1), per_sample=True)(X).lstsq(X[:, :1]),
        ValueError,
        "the matrix plus damping must be positive definite",
    ),
}

ROWS = [
    *(Bad("linearize", name, *how) for name, how in CALLS.items()),
    *(Bad("module_operator", name, *how) for name, how in OF_MODULES.items()),
]
