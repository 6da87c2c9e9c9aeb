"""Written products take parameters without a copy of their own, where operations only read them."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.factored.test_layers_lent import (
    WRITES,
    Late,
    doubled_by_data,
    doubled_on_the_graph,
    used_elsewhere,
)
from tests.house.calls import num_calls
from tests.settled.test_sweeps import num_sweeps

BEFORE = 20
"""After so many products they are written down."""


def num_copies(sizes: set[int], run: Callable[[], Any]) -> int:
    """How many tensors of so many numbers are cloned."""

    def is_copy(frame: FrameType, event: str, called: Any) -> bool:
        is_clone = event == "c_call" and getattr(called, "__name__", "") == "clone"
        return is_clone and called.__self__.numel() in sizes

    return num_calls(run, is_copy)


def expected(module: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """``Jᵀ H J v`` for the only parameter and the mean squared error, by hand."""
    weight = module.weight.detach().clone()

    def outputs(weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, {"weight": weight * 1}, (x,))
        return out

    rows = torch.autograd.functional.jacobian(outputs, weight).reshape(-1, weight.numel())
    product: Tensor = rows.T @ (rows @ v.flatten()) * 2 / len(rows)
    return product.view_as(weight)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("then", [*WRITES, doubled_by_data, doubled_on_the_graph, used_elsewhere])
def test_a_write_at_a_later_call_goes_into_a_copy(
    then: Callable[[Tensor], Any], copy: bool
) -> None:
    module = Late(then)
    ggn = jacfunc.ggn(module, F.mse_loss, copy=copy)
    for number in range(BEFORE + 6):
        module.is_late[0] = BEFORE < number < BEFORE + 5
        x, y = torch.randn(4, 5).double(), torch.randn(4, 3).double()
        v = torch.randn_like(module.weight)
        before, right = module.weight.detach().clone(), expected(module, x, v)
        G = ggn(x, y)
        for _ in range(2):
            torch.testing.assert_close((G @ {"weight": v})["weight"], right, rtol=0, atol=1e-12)
        assert torch.equal(module.weight, before)


@torch.jit.script
def hidden(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


@pytest.mark.parametrize("before", [1, 3, 10])
def test_a_write_that_nobody_sees_is_not_pushed_forward(before: int) -> None:
    module = Late(hidden)
    ggn = jacfunc.ggn(module, F.mse_loss)
    for number in range(before + 3):
        module.is_late[0] = number >= before
        x, y, v = torch.randn(4, 5).double(), torch.randn(4, 3).double(), torch.randn(3, 5).double()
        right = expected(module, x, v)
        found = (ggn(x, y) @ {"weight": v})["weight"]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_a_write_that_nobody_sees_is_told() -> None:
    module, v = Late(hidden), torch.randn(3, 5).double()
    x, y = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    ggn, before = jacfunc.ggn(module, F.mse_loss), module.weight.detach().clone()
    for _ in range(BEFORE):
        ggn(x, y) @ {"weight": v}
    module.is_late[0] = True
    with pytest.raises(RuntimeError, match=r"operations that Python sees.*Write into a copy"):
        ggn(x, y) @ {"weight": v}
    # from then on it is a copy that is written into
    right = expected(module, x, v)
    torch.testing.assert_close((ggn(x, y) @ {"weight": v})["weight"], right, rtol=0, atol=1e-12)
    assert torch.equal(module.weight, before)


class Mixed(nn.Module):
    """One parameter goes through operations that have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.factor = nn.Parameter(torch.rand(11))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh()) * self.factor.prod().exp()
        return out


def test_parameters_that_are_only_read_are_copied_once_for_a_point() -> None:
    model, x, y = Mixed(), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    v = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    numbers = {param.numel() for name, param in model.named_parameters() if name != "factor"}
    for copy in (True, False):
        ggn = jacfunc.ggn(model, F.cross_entropy, copy=copy)
        for _ in range(BEFORE):
            ggn(x, y) @ v
        assert num_sweeps(lambda: ggn(x, y) @ v) == 0  # noqa: B023
        count = len(numbers) if copy else 0  # those that the point keeps
        assert num_copies(numbers, lambda: ggn(x, y) @ v) == count  # noqa: B023
        assert num_copies({11}, lambda: ggn(x, y) @ v) == 1 + copy  # noqa: B023


def test_nothing_is_copied_for_one_sample() -> None:
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(1, 5)
    numbers = {param.numel() for param in model.parameters()}
    jacobian = jacfunc.module_jacobian(model)
    for _ in range(40):
        jacobian(x)
    found = {}
    assert num_copies(numbers, lambda: found.update(jacobian(x))) == 0
    for number, out in enumerate(model(x)[0]):
        rows = torch.autograd.grad(out, [*model.parameters()], retain_graph=True)
        for block, row in zip(found.values(), rows, strict=True):
            torch.testing.assert_close(block[0, number], row)
