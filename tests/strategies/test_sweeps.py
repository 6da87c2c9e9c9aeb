"""A strategy that no other file knows: what it says of its sweeps is enough for all others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import jacfunc
from jacfunc._assembly import sweep, sweep_leaves
from jacfunc._calls import Derivation
from jacfunc._forecasting import CallForecast, counted_costs
from jacfunc._linear_map import JacobianOperator
from jacfunc._memory import Chunk
from jacfunc._planning import Plan
from jacfunc.strategies import Sweeping, Sweeps

A = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def func(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(A @ x)


@dataclass(frozen=True)
class InPairs(Sweeping):
    """Two rows, or two columns, at once."""

    over: str = "rows"

    @property
    def sweeps(self) -> Sweeps:
        return Sweeps("columns" if self.over == "columns" else "rows", 2)

    def products(self, operator: JacobianOperator):
        if self.over == "columns":
            return partial(sweep, operator.pushforward_batch, operator.primals)
        return partial(sweep_leaves, operator.pullback_batch, operator.outputs)


class OnlyBlocks:
    """A strategy of the user's, which hands on what another returns."""

    def materialize(self, operator: JacobianOperator):
        return jacfunc.Reverse().materialize(operator)


class Twice(jacfunc.Reverse):
    """A user's subclass, which changes the blocks."""

    def materialize(self, operator: JacobianOperator):
        return tuple(tuple(2 * block for block in row) for row in super().materialize(operator))


BOTH = pytest.mark.parametrize("strategy", [InPairs("rows"), InPairs("columns")])
EVERY = pytest.mark.parametrize("strategy", [InPairs("rows"), InPairs("columns"), OnlyBlocks()])


@EVERY
def test_it_gives_the_jacobian(strategy) -> None:
    x = torch.linspace(-1, 1, 4)
    expected = jacfunc.jacrev(func)(x)
    torch.testing.assert_close(jacfunc.jacobian(func, strategy=strategy)(x), expected)
    plan = Plan(strategy, "it was asked for")
    torch.testing.assert_close(jacfunc.jacobian(func, strategy=plan)(x), expected)


@EVERY
def test_it_writes_into_out(strategy) -> None:
    x, out = torch.linspace(-1, 1, 4), torch.empty(6, 4)
    assert jacfunc.jacobian(func, strategy=strategy, out=out)(x) is out
    torch.testing.assert_close(out, jacfunc.jacrev(func)(x))


def test_a_subclass_with_a_materialize_of_its_own_is_asked_for_that() -> None:
    x = torch.linspace(-1, 1, 4)
    doubled = jacfunc.jacobian(func, strategy=Twice())(x)
    torch.testing.assert_close(doubled, 2 * jacfunc.jacrev(func)(x))


@BOTH
def test_it_is_forecast_as_one_that_is_known(strategy) -> None:
    x = torch.linspace(-1, 1, 4)
    known = {"rows": jacfunc.Reverse(2), "columns": jacfunc.Forward(2)}[strategy.over]
    call = CallForecast(Derivation("estimate", func, 0, False), (x,), {})
    mine, its = call.forecast(strategy), call.forecast(known)
    assert (mine.sweeps, mine.evaluations, mine.flops) == (its.sweeps, its.evaluations, its.flops)
    assert (mine.chunk_size, mine.peak_bytes) == (2, its.peak_bytes)
    costs = counted_costs(JacobianOperator(lambda x: ((func(x),), ()), (x,)))
    assert costs is not None
    assert costs.seconds(strategy) == costs.seconds(known)


def test_rows_that_are_copied_come_in_the_chunks_that_the_sink_wants() -> None:
    chunks: list[Chunk] = []

    class All(InPairs):
        sweeps = Sweeps("rows")

        def products(self, operator: JacobianOperator):
            rows = super().products(operator)
            return lambda chunk: chunks.append(chunk) or rows(chunk)

    model = torch.nn.Linear(4, 6)
    expected = jacfunc.module_jacobian(model, "inputs", strategy="reverse")(torch.ones(4))
    jac = jacfunc.module_jacobian(model, "inputs", strategy=All(), flat=True)(torch.ones(4))
    torch.testing.assert_close(jac, expected)
    assert chunks == [6]
