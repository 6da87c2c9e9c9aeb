"""Doors inside a function under ``torch.compile``: right without a graph break, or listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.truth.dynamo import INSIDE_COMPILER

pytestmark = INSIDE_COMPILER

MODEL = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
LEARNED = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
X = torch.linspace(-1, 1, 4)
XS, GOALS = torch.stack([X, X.cos()]), torch.zeros(2, 3)
LOSS = nn.MSELoss()

TRACED: dict[str, Callable[[Tensor], Any]] = {
    "jacobian": lambda x: jacfunc.jacobian(MODEL)(x),
    "jacrev": lambda x: jacfunc.jacrev(MODEL)(x),
    "jacfwd": lambda x: jacfunc.jacfwd(MODEL)(x),
    "value": lambda x: jacfunc.value_and_jacobian(MODEL)(x)[1],
    "vjp": lambda x: torch.stack([jacfunc.vjp(MODEL, x)[1](row)[0] for row in torch.eye(3)]),
    "jvp": lambda x: torch.stack([jacfunc.jvp(MODEL, (x,), (e,))[1] for e in torch.eye(4)], 1),
    "vmap": lambda x: jacfunc.vmap(jacfunc.jacrev(MODEL))(x[None])[0],
    "compiled": jacfunc.compile(jacfunc.jacrev(MODEL), backend="replay"),
}


@pytest.mark.parametrize("name", TRACED)
def test_doors_that_torch_traces(name: str) -> None:
    door = TRACED[name]
    compiled = torch.compile(lambda x: 2 * door(x), backend="eager", fullgraph=True)
    for x in (X, 2 * X):
        torch.testing.assert_close(compiled(x), 2 * torch.func.jacrev(MODEL)(x))


LISTED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "module": (jacfunc.module_jacobian(LEARNED), "outside of torch.compile"),
    "per sample": (jacfunc.module_jacobian(LEARNED, per_sample=True), "outside of torch.compile"),
    "inputs": (jacfunc.module_jacobian(LEARNED, "inputs"), "outside of torch.compile"),
    "ntk": (lambda x: jacfunc.ntk(LEARNED, None, x), "outside of torch.compile"),
    "ggn": (lambda x: jacfunc.ggn(LEARNED, LOSS)(x, GOALS).diagonal(), "outside of torch.compile"),
    "norms": (lambda x: jacfunc.gradient_norms(LEARNED, LOSS)(x, GOALS), "outside of torch.comp"),
    "graph": (
        lambda x: jacfunc.graph_jacobian(LEARNED(x).sum(0), [*LEARNED.parameters()]),
        "outside of transforms",
    ),
    "compiled": (
        jacfunc.compile(jacfunc.module_jacobian(LEARNED), backend="replay"),
        "outside of torch.compile",
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_doors_that_are_listed(name: str) -> None:
    door, words = LISTED[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        torch.compile(lambda xs: door(xs), backend="eager", fullgraph=True)(XS)


def test_between_graphs_what_is_compiled_is_not_traced() -> None:
    jac = jacfunc.compile(jacfunc.module_jacobian(LEARNED, "inputs"), backend="replay")
    compiled = torch.compile(lambda x: 2 * jac(x.sin()), backend="eager")
    for x in (X, 2 * X):
        torch.testing.assert_close(compiled(x), 2 * torch.func.jacrev(LEARNED)(x.sin()).detach())
    assert len(jac.compilations) == 1
