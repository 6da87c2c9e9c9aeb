"""What lies behind an output is told apart, as far as its backward pass may differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jacfunc._torch import Graphs
from jacfunc._traces import Sources, outline


def outline_of(func: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Any, ...] | None:
    """The outline of a function of a copy and of two leaves, made anew."""
    copy = torch.ones(2, requires_grad=True).clone()
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    starts, before = {copy.grad_fn: 0, id(first): 1, id(second): 2}, Graphs.num_nodes()
    return outline(func(copy, first, second), starts, before, Sources())


def of_another(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    _, last = (x * a).sin(), (x * b).sin()
    return last


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one leaf": lambda x, a, b: (x * a).sin(),
    "the other leaf": lambda x, a, b: (x * b).sin(),
    "leaves alone": lambda x, a, b: (a * b).sin(),
    "in another order": lambda x, a, b: (b * a).sin(),
    "twice the same": lambda x, a, b: (a * a).sin(),
    "another operation": lambda x, a, b: (x * a).cos(),
    "after others": of_another,
    "a number": lambda x, a, b: (x * a).sin() * 2.0,
    "another number": lambda x, a, b: (x * a).sin() * 3.0,
    "a slope": lambda x, a, b: torch.nn.functional.leaky_relu(x * a, 0.1),
    "another slope": lambda x, a, b: torch.nn.functional.leaky_relu(x * a, 0.2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_has_an_outline_of_its_own(name: str) -> None:
    outlines = {other: outline_of(func) for other, func in FUNCTIONS.items()}
    assert outlines[name] is not None
    assert [other for other, each in outlines.items() if each == outlines[name]] == [name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluations_of_one_function_have_one_outline(name: str) -> None:
    torch.ones(3, requires_grad=True).sin()  # nodes that were made before do not count
    assert outline_of(FUNCTIONS[name]) == outline_of(FUNCTIONS[name])


def test_what_leads_to_a_leaf_of_the_user_has_none() -> None:
    theirs = torch.ones(2, requires_grad=True)
    assert outline_of(lambda x, a, b: x * a * theirs) is None
    assert outline_of(lambda x, a, b: theirs * theirs) is None
