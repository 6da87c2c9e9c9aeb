"""Evaluations get copies of what a module keeps, at little cost where that is plain values."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.house.calls import num_calls

KEPT: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "dict of values": lambda: {"b": 1, "a": 2.0, "c": None},
    "set": lambda: {"names"},
}
each_kept = pytest.mark.parametrize("name", KEPT)


class Keeping(nn.Module):
    """It keeps containers, and tells what it finds in them."""

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), print
        for number in range(count):
            setattr(self, f"kept{number}", make())

    def forward(self, x: Tensor) -> Any:
        for name, value in vars(self).items():
            if name.startswith("kept"):
                self.seen(list(value))
                value.update({"new": 1})
        return self.layer(x)


def tree_calls(model: nn.Module) -> int:
    """How many functions of trees a call enters, of a kind that was called before."""
    jac, x = jacfunc.module_jacobian(model, per_sample=True), torch.ones(4, 3)
    for _ in range(4):
        jac(x)

    def is_of_trees(frame: FrameType, event: str, _: Any) -> bool:
        return event == "call" and "/_trees/" in frame.f_code.co_filename

    return num_calls(lambda: jac(x), is_of_trees)


@each_kept
def test_plain_values_are_copied_without_a_tree(name: str) -> None:
    quiet = [Keeping(KEPT[name], count) for count in (1, 9)]
    for model in quiet:
        model.seen = len  # type: ignore[assignment]
    few, many = map(tree_calls, quiet)
    assert few == many


@each_kept
def test_what_an_evaluation_writes_into_is_a_copy(name: str) -> None:
    model, seen = Keeping(KEPT[name], 1), list[Any]()
    model.seen = seen.append  # type: ignore[assignment]
    jac = jacfunc.module_jacobian(model, per_sample=True)
    for _ in range(3):
        jac(torch.ones(4, 3))
    assert model.kept0 == KEPT[name]()
    # in the order in which they were put in, and at each evaluation anew
    assert all(each == list(KEPT[name]()) for each in seen)


def test_two_modules_with_one_set_have_one_copy() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.first = nn.Linear(3, 2), {"names"}
            self.second = self.first

        def forward(self, x: Tensor) -> Any:
            assert self.first is self.second
            return self.layer(x)

    model = Pair()
    jac = jacfunc.module_jacobian(model, per_sample=True)
    assert jac(torch.ones(4, 3))["layer.bias"].shape == (4, 2, 2)
