"""Every public door inside a function under ``torch.compile``: it is traced, or refused in words.

A door that is traced is compiled as one graph, once for all sizes of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree

import jacfunc
from jacfunc import operators
from tests.truth.dynamo import INSIDE_COMPILER

pytestmark = INSIDE_COMPILER

WEIGHT = torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.1, 0.7]])
MODEL = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
FROZEN = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False)
LOSS = nn.MSELoss()


def func(x: Tensor) -> Tensor:
    """``[B, 3]`` → ``[B, 2]``."""
    return x.sin() @ WEIGHT


def number(x: Tensor) -> Tensor:
    return func(x).square().sum()


def goals(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 2)


Door = Callable[[Tensor], Any]

TRACED: dict[str, Door] = {
    "jacobian": lambda x: jacfunc.jacobian(func)(x),
    "jacrev": lambda x: jacfunc.jacrev(func)(x),
    "jacfwd": lambda x: jacfunc.jacfwd(func)(x),
    "value_and_jacobian": lambda x: jacfunc.value_and_jacobian(func)(x),
    "hessian": lambda x: jacfunc.hessian(number)(x),
    "hvp": lambda x: jacfunc.hvp(number, (x,), (x,)),
    "jvp": lambda x: jacfunc.jvp(func, (x,), (x,)),
    "vjp": lambda x: jacfunc.vjp(func, x)[1](func(x)),
    "vmap": lambda x: jacfunc.vmap(jacfunc.jacobian(func))(x),
    "vmap of jacfwd": lambda x: jacfunc.vmap(jacfunc.jacfwd(func))(x),
    "laplacian": lambda x: jacfunc.vmap(jacfunc.laplacian(number))(x),
    "value_jacobian_laplacian": lambda x: jacfunc.value_jacobian_laplacian(number)(x),
    "hessian_diagonal": lambda x: jacfunc.hessian_diagonal(number)(x),
    "divergence": lambda x: jacfunc.divergence(torch.sin)(x),
    "linearize": lambda x: jacfunc.linearize(func, x)[1].mv(x),
    "linearize, transposed": lambda x: jacfunc.linearize(func, x)[1].rmv(func(x)),
    "linearize, matrix": lambda x: jacfunc.linearize(func, x)[1].matrix(),
    "hessian_operator": lambda x: jacfunc.hessian_operator(number, x)[1].mv(x),
    "operators.trace": lambda x: operators.trace(jacfunc.hessian_operator(number, x)[1]),
    "operators.diagonal": lambda x: operators.diagonal(jacfunc.hessian_operator(number, x)[1]),
    "operators.frobenius_norm": lambda x: operators.frobenius_norm(jacfunc.linearize(func, x)[1]),
}
COMPILED = jacfunc.compile(jacfunc.jacrev(func), backend="replay")
TRACED["compile, outside"] = lambda x: COMPILED(x)

COMPILED_OF_MODULE = jacfunc.compile(jacfunc.jacrev(FROZEN), backend="replay")
OF_MODULE: dict[str, Door] = {
    "jacobian": lambda x: jacfunc.jacobian(FROZEN)(x),
    "jacrev": lambda x: jacfunc.jacrev(FROZEN)(x),
    "jacfwd": lambda x: jacfunc.jacfwd(FROZEN)(x),
    "value_and_jacobian": lambda x: jacfunc.value_and_jacobian(FROZEN)(x)[1],
    "vjp": lambda x: torch.stack([jacfunc.vjp(FROZEN, x)[1](row)[0] for row in torch.eye(2)]),
    "jvp": lambda x: torch.stack([jacfunc.jvp(FROZEN, (x,), (e,))[1] for e in torch.eye(3)], 1),
    "vmap": lambda x: jacfunc.vmap(jacfunc.jacrev(FROZEN))(x[None])[0],
    "compile, outside": lambda x: COMPILED_OF_MODULE(x),
}
"""The Jacobian of a module at one sample, by each door that is traced."""

TRACED |= {
    f"{name} of a module": lambda x, door=door: 2 * door(x[-1])  # type: ignore[misc]
    for name, door in OF_MODULE.items()
}

OUTSIDE, METHODS = "outside of torch.compile", r"Write J\.mv\(v\)"
PER_SAMPLE = jacfunc.module_jacobian(MODEL, per_sample=True)
BY_INPUTS = jacfunc.module_jacobian(MODEL, "inputs")
COMPILED_BY_PARAMS = jacfunc.compile(jacfunc.module_jacobian(MODEL), backend="replay")
REFUSED: dict[str, tuple[Door, str]] = {
    "compile": (lambda x: jacfunc.compile(jacfunc.jacrev(func), backend="replay")(x), OUTSIDE),
    "estimate": (lambda x: len(jacfunc.estimate(func, x)), OUTSIDE),
    "plan": (lambda x: jacfunc.plan(func, x).reason, OUTSIDE),
    "explain": (lambda x: jacfunc.explain(func, x).seconds, OUTSIDE),
    "gram": (lambda x: jacfunc.gram(func)(x), OUTSIDE),
    "ntk": (lambda x: jacfunc.ntk(MODEL, None, x), OUTSIDE),
    "ntk of a function": (lambda x: jacfunc.ntk(lambda w, x: (x @ w).sin(), WEIGHT, x), OUTSIDE),
    "linearize, @": (lambda x: jacfunc.linearize(func, x)[1] @ x, METHODS),
    "linearize, @ of the transpose": (
        lambda x: jacfunc.linearize(func, x)[1].T @ func(x),
        METHODS,
    ),
    "linearize, lstsq": (lambda x: jacfunc.linearize(func, x)[1].lstsq(func(x)), OUTSIDE),
    "module_jacobian": (lambda x: jacfunc.module_jacobian(MODEL)(x), OUTSIDE),
    "module_jacobian, made before": (jacfunc.module_jacobian(MODEL), OUTSIDE),
    "module_jacobian, per sample": (PER_SAMPLE, OUTSIDE),
    "module_jacobian, by inputs": (BY_INPUTS, OUTSIDE),
    "compile, outside, of module_jacobian": (COMPILED_BY_PARAMS, OUTSIDE),
    "module_operator": (lambda x: jacfunc.module_operator(MODEL)(x).matrix(), OUTSIDE),
    "module_hessian": (
        lambda x: jacfunc.module_hessian(MODEL, LOSS)(x, goals(x)).matrix(),
        OUTSIDE,
    ),
    "stream_jacobian": (lambda x: [*jacfunc.stream_jacobian(MODEL)(x)], OUTSIDE),
    "ggn": (lambda x: jacfunc.ggn(MODEL, LOSS)(x, goals(x)).diagonal(), OUTSIDE),
    "fisher": (lambda x: jacfunc.fisher(MODEL, "gaussian")(x).diagonal(), OUTSIDE),
    "gradient_norms": (lambda x: jacfunc.gradient_norms(MODEL, LOSS)(x, goals(x)), OUTSIDE),
    "random_projection": (lambda x: jacfunc.random_projection(MODEL, 2)(x), OUTSIDE),
    "param_slices": (lambda x: jacfunc.param_slices(MODEL), OUTSIDE),
    "graph_jacobian": (
        lambda x: jacfunc.graph_jacobian(MODEL(x).sum(0), [*MODEL.parameters()]),
        "outside of transforms",
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_door_is_traced_once_for_all_sizes_of_a_batch(name: str) -> None:
    door, counter = TRACED[name], CompileCounter()
    compiled = torch.compile(lambda x: door(x), backend=counter, fullgraph=True)
    for size in (5, 7):
        x = torch.linspace(-1, 1, 3 * size).view(size, 3)
        of_module = 2 * torch.func.jacrev(FROZEN)(x[-1])
        want = of_module if name.endswith("of a module") else door(x.clone())
        torch._dynamo.mark_dynamic(x, 0)
        got = compiled(x)
        pairs = zip(_pytree.tree_leaves(got), _pytree.tree_leaves(want), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_all_sizes_may_be_left_open() -> None:
    door, counter = TRACED["jacobian"], CompileCounter()
    compiled = torch.compile(lambda x: door(x), backend=counter, fullgraph=True, dynamic=True)
    for size in (5, 7, 8):
        x = torch.linspace(-1, 1, 3 * size).view(size, 3)
        torch.testing.assert_close(compiled(x), door(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_door_is_refused_in_words(name: str) -> None:
    door, words = REFUSED[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        torch.compile(lambda x: door(x), backend="eager", fullgraph=True)(torch.ones(5, 3))


def test_between_graphs_what_is_compiled_is_not_traced() -> None:
    jac = jacfunc.compile(jacfunc.module_jacobian(MODEL, "inputs"), backend="replay")
    compiled = torch.compile(lambda x: 2 * jac(x.sin()), backend="eager")
    for x in (torch.linspace(-1, 1, 3), torch.linspace(-2, 2, 3)):
        torch.testing.assert_close(compiled(x), 2 * torch.func.jacrev(MODEL)(x.sin()).detach())
    assert len(jac.compilations) == 1


BESIDE = {
    "empty_cache": "gives memory back",
    "operators.spectral_norm": "iterates until numbers stay",
    "operators.logdet": "looks at signs of numbers",
}
"""Doors for which there is nothing to trace."""


def test_every_door_has_a_row() -> None:
    doors = {
        prefix + name
        for place, prefix in ((jacfunc, ""), (operators, "operators."))
        for name in place.__all__
        if not isinstance(getattr(place, name), type)
    }
    assert doors - {f"operators.{name}" for name in jacfunc.__all__} <= (
        TRACED.keys() | REFUSED.keys() | BESIDE.keys()
    )
