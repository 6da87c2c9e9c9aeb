"""Columns that a plan takes in chunks, of which all rows are written down in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import jacfunc
from jacfunc import Forward
from jacfunc._planning import Auto
from jacfunc.strategies import Strategy, Streaming
from jacfunc.strategies._settled import MOST_LOOKS
from tests.house.calls import num_calls

Jacobian: TypeAlias = Callable[[Tensor], Tensor]

SIDE = 32
KERNEL = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)


def heat(nonlinearity: Callable[[Tensor], Tensor] = torch.sin) -> Callable[[Tensor], Tensor]:
    """The five points of a Laplacian, and a nonlinearity."""
    return lambda u: F.conv2d(u[None, None], KERNEL.to(u), padding=1)[0, 0] + nonlinearity(u)


def closed_form(u: Tensor, slope: Callable[[Tensor], Tensor] = torch.cos) -> Tensor:
    """The five entries of a row, one by one."""
    result = torch.zeros(*u.shape, *u.shape, dtype=u.dtype)
    for i in range(SIDE):
        for j in range(SIDE):
            result[i, j, i, j] = slope(u[i, j]) - 4
            for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= k < SIDE and 0 <= m < SIDE:
                    result[i, j, k, m] = 1
    return result


@dataclass(frozen=True)
class InFours(Streaming):
    """Chooses chunks of columns, and tells how long they take, and that all rows fit."""

    seconds: float | None = inf

    def into(self, sink: Any, operator: Any) -> Any:
        return self._chosen.into(sink, operator)

    def settled_for(self, kind: Any) -> Strategy:
        return self._chosen

    def all_rows_within(self, kind: Any) -> float | None:
        return self.seconds

    @property
    def _chosen(self) -> Forward:
        return Forward(SIDE**2 // 4)


def draw() -> Tensor:
    return torch.randn(SIDE, SIDE, dtype=torch.float64)


def num_evaluations(call: Callable[[], object], func: Any) -> int:
    code = func.__code__
    return num_calls(call, lambda frame, event, _: event == "call" and frame.f_code is code)


def evaluations(jac: Jacobian, func: Any) -> int:
    """How often a call evaluates the function; its Jacobian must be right."""
    results: list[Tensor] = []
    u = draw()
    count = num_evaluations(lambda: results.append(jac(u)), func)
    torch.testing.assert_close(results[0], closed_form(u))
    return count


def settled(func: Callable[[Tensor], Tensor], strategy: Strategy) -> Jacobian:
    """A derivative after the calls that are looked at."""
    jac = jacfunc.jacobian(func, strategy=strategy)
    for _ in range(MOST_LOOKS):
        jac(draw())
    return jac


def test_all_rows_take_one_evaluation_in_the_end() -> None:
    func = heat()
    jac = jacfunc.jacobian(func, strategy=InFours())
    counts = [evaluations(jac, func) for _ in range(MOST_LOOKS + 4)]
    assert min(counts[:MOST_LOOKS]) >= 4
    assert counts[MOST_LOOKS:] == [1] * 4


@pytest.mark.parametrize("seconds", [None, 0.0], ids=["too large", "not faster"])
def test_what_does_not_pay_stays_in_chunks(seconds: float | None) -> None:
    func = heat()
    assert evaluations(settled(func, InFours(seconds)), func) >= 4


def test_another_graph_is_taken_in_chunks_again() -> None:
    power = 0.0

    def func(u: Tensor) -> Tensor:
        return heat(lambda x: x**power if power else x.sin())(u)

    jac = settled(func, InFours())
    assert evaluations(jac, func) == 1
    power, u = 3.0, draw()
    torch.testing.assert_close(jac(u), closed_form(u, lambda x: 3 * x**2))
    power = 0.0
    assert evaluations(jac, func) > 1


def test_a_nan_is_refused_as_before() -> None:
    jac, u = settled(heat(), InFours()), draw()
    u[3, 3] = torch.nan
    with pytest.raises(NotImplementedError, match="forward mode gives nan"):
        jac(u)


def test_a_budget_stays_with_its_chunks() -> None:
    func = heat()
    jac = settled(func, Auto(memory=2**26))
    assert evaluations(jac, func) > 1


def test_all_rows_must_keep_to_the_memory() -> None:
    """They take twice the result at least, and chunks of columns do not."""
    u = draw()
    assert jacfunc.plan(heat(), u).fits_all_rows
    assert not jacfunc.plan(heat(), u, memory=int(1.5 * 8 * SIDE**4)).fits_all_rows


def test_what_others_differentiate_by_keeps_its_graph() -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    jac = settled(lambda u: scale * heat()(u), InFours())
    u = draw()
    (slope,) = torch.autograd.grad(jac(u).sum(), scale)
    torch.testing.assert_close(slope, closed_form(u).sum())
