"""Evaluations for a written sweep: watched only where the watch has found something to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._faults.watch import Watch
from jacfunc._traces import FEWEST_CALLS
from tests.house.calls import num_calls

B, CALLS = 3, FEWEST_CALLS + 8


class Trying(nn.Module):
    """Catches errors, so that a call of it is watched; and a way to go that a user may change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 64), nn.Linear(64, 8)
        self.way = ["plain"]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        try:
            if self.way[0] == "writes":
                self.last.weight.mul_(2.0)
            elif self.way[0] == "sinc":
                h = torch.sinc(h)
            elif self.way[0] == "frozen":
                h = h * h.detach()
            elif self.way[0] == "maps":
                torch.vmap(Tensor.item)(h[:, 0])
        except RuntimeError:
            pass
        out: Tensor = self.last(h)
        return out


def jacobian_of(module: nn.Module, wrt: Any = "params") -> Callable[[Tensor], Tensor]:
    """By layers, as calls of a watched module under vmap are not settled."""
    strategy = "structured" if wrt == "params" else "auto"
    return jacfunc.module_jacobian(module, wrt, per_sample=True, flat=True, strategy=strategy)


def rows_of(module: nn.Module, x: Tensor, by_inputs: bool) -> Tensor:
    """Rows ``[B, M, N]`` of each sample alone, one pullback after the other."""
    rows = []
    for sample in x:
        own = sample[None].clone().requires_grad_()
        ends = [own] if by_inputs else [*module.parameters()]
        for value in module(own)[0]:
            parts = torch.autograd.grad(value, ends, retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).view(len(x), -1, rows[0].numel())


def num_watches(run: Callable[[], object]) -> int:
    """How many watches are entered meanwhile."""
    enter: Any = Watch.__enter__
    return num_calls(
        run, lambda frame, event, _: event == "call" and frame.f_code is enter.__code__
    )


@pytest.mark.parametrize("size", [1, B])
@pytest.mark.parametrize("wrt", ["params", "inputs"])
def test_known_operations_are_not_watched_again(wrt: Any, size: int) -> None:
    torch.manual_seed(0)
    module, x = Trying(), torch.randn(size, 5, dtype=torch.float64)
    jac = jacobian_of(module, wrt)
    for _ in range(FEWEST_CALLS // 2):
        jac(x)
    assert num_watches(lambda: jac(x))  # it may catch errors
    for _ in range(CALLS):
        jac(x)
    for _ in range(3):
        y = torch.randn_like(x)
        assert not num_watches(lambda y=y: jac(y))  # type: ignore[misc]
        torch.testing.assert_close(jac(y), rows_of(module, y, wrt == "inputs"))


@pytest.mark.parametrize("way", ["sinc", "frozen"])
@pytest.mark.parametrize("wrt", ["params", "inputs"])
def test_another_way_later_is_watched(wrt: Any, way: str) -> None:
    torch.manual_seed(0)
    module, x = Trying(), torch.randn(B, 5, dtype=torch.float64)
    jac = jacobian_of(module, wrt)
    for _ in range(CALLS):
        jac(x)
    module.way[0] = way
    assert num_watches(lambda: jac(x))
    for _ in range(CALLS):
        torch.testing.assert_close(jac(x), rows_of(module, x, wrt == "inputs"))


def test_what_the_watch_replaces_is_watched_for_good() -> None:
    torch.manual_seed(0)
    module, x = Trying(), torch.randn(B, 5, dtype=torch.float64)
    module.way[0] = "sinc"
    jac = jacobian_of(module)
    for _ in range(CALLS):
        jac(x)
    assert num_watches(lambda: jac(x))
    torch.testing.assert_close(jac(x), rows_of(module, x, by_inputs=False))


@pytest.mark.parametrize("size", [1, B])
def test_a_refusal_that_the_function_catches_later_is_seen(size: int) -> None:
    torch.manual_seed(0)
    module, x = Trying(), torch.randn(size, 5, dtype=torch.float64)
    jac = jacobian_of(module)
    for _ in range(CALLS):
        jac(x)
    module.way[0] = "writes"
    before = module.last.weight.detach().clone()
    with torch.no_grad():
        expected = rows_after_write(module, x)
    try:
        found = jac(x)
    except (RuntimeError, TypeError, ValueError):
        pass  # told in words is right, too
    else:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module.last.weight.detach(), before)


def rows_after_write(module: Trying, x: Tensor) -> Tensor:
    """What a module that first doubles its last weight returns, differentiated by what it had."""
    own = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    rows = []
    with torch.enable_grad():
        for sample in x:
            h = nn.functional.linear(sample[None], own["first.weight"], own["first.bias"]).tanh()
            out = nn.functional.linear(h, own["last.weight"] * 2, own["last.bias"])[0]
            for value in out:
                parts = torch.autograd.grad(value, [*own.values()], retain_graph=True)
                rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).view(len(x), -1, rows[0].numel())


@pytest.mark.parametrize("size", [1, B])
@pytest.mark.parametrize("wrt", ["params", "inputs"])
def test_an_error_that_only_a_watch_tells_is_told_later_too(wrt: Any, size: int) -> None:
    torch.manual_seed(0)
    module, x = Trying(), torch.randn(size, 5, dtype=torch.float64)
    jac = jacobian_of(module, wrt)
    for _ in range(CALLS):
        jac(x)
    assert not num_watches(lambda: jac(x))
    module.way[0] = "maps"
    told = []
    for each in (jac, jacobian_of(module, wrt)):
        try:
            told.append(each(x))
        except Exception as error:
            told.append(f"{type(error)} {error}")
    assert type(told[0]) is type(told[1])
    assert isinstance(told[0], Tensor) or told[0] == told[1]
    if isinstance(told[0], Tensor):
        torch.testing.assert_close(told[0], told[1])
