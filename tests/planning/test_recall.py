"""Where a forecast was far off, the second plan gets a try, once a kind of call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import jacfunc
from jacfunc import Forward, Plan, Reverse, Structured
from jacfunc._errors import Refused
from jacfunc._forecasting.costs import Costs
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._log import trail
from jacfunc._memory import Chunk
from jacfunc._planning.auto import Auto
from jacfunc._planning.budget import bounded, bounded_samples
from jacfunc._planning.choice import fastest
from jacfunc._planning.recall import by_memory
from jacfunc._remembered import CallKind
from tests.planning.test_planner import invented

FIRST = Plan(Reverse(), "made up", 1.0, (), second=Plan(Forward(), "second", 2.0))


class Calls:
    """Calls of one kind: which strategies ran, and on what a clock that is told what they take."""

    def __init__(self, plan: Plan, **took: list[float]) -> None:
        self.kind = CallKind(lambda x: x, object(), None)
        self.auto, self.plan, self.ran, self.now = Auto(), plan, list[str](), 0.0
        self._took = {name: iter(seconds) for name, seconds in took.items()}

    def call(self) -> str:
        def run(plan: Plan, chunk: Chunk) -> str:
            name = type(plan.strategy).__name__
            self.now += next(self._took[name], 1.0)
            self.ran.append(name)
            return name

        return by_memory(
            self.auto, self.kind, lambda: (self.plan, None), run, clock=lambda: self.now
        )

    def names(self, count: int) -> str:
        return "".join(self.call()[0] for _ in range(count))


def test_as_forecast() -> None:
    assert Calls(FIRST, Reverse=[100.0, 2.9, 1.0]).names(6) == "RRRRRR"


def test_the_second_is_tried_and_kept_where_it_is_faster() -> None:
    calls = Calls(FIRST, Reverse=[5.0, 4.0, 5.0], Forward=[3.7])
    with trail() as steps:
        assert calls.names(7) == "RRRFFFF"
    (told,) = steps
    assert told.startswith("Reverse(chunk_size=None) took 4 s, so Forward(chunk_size=None")


def test_one_run_that_is_hardly_faster_does_not_replace_the_first() -> None:
    assert Calls(FIRST, Reverse=[5.0, 4.0, 5.0], Forward=[3.9]).names(7) == "RRRFRRR"


def test_the_first_is_taken_again_where_it_was_faster() -> None:
    calls = Calls(FIRST, Reverse=[5.0, 4.0, 5.0, 9.0, 9.0, 9.0], Forward=[4.1])
    assert calls.names(8) == "RRRFRRRR"


def test_a_plan_by_layers_takes_less_in_later_calls() -> None:
    layers = Plan(Structured(), "by layers", 2.0)
    after_reverse = replace(FIRST, second=layers)
    assert Calls(after_reverse, Reverse=[5.0, 4.0, 5.0], Structured=[4.5]).names(6) == "RRRSSS"
    assert Calls(after_reverse, Reverse=[5.0, 4.0, 5.0], Structured=[4.6]).names(6) == "RRRSRR"
    before_reverse = replace(layers, seconds=1.0, second=Plan(Reverse(), "second", 2.0))
    assert Calls(before_reverse, Structured=[5.0, 4.8, 5.0], Reverse=[3.7]).names(6) == "SSSRRR"
    assert Calls(before_reverse, Structured=[5.0, 4.8, 5.0], Reverse=[3.9]).names(6) == "SSSRSS"


def test_forecasts_of_a_busy_machine_are_too_long_and_in_no_certain_order() -> None:
    assert Calls(FIRST, Reverse=[0.3] * 6, Forward=[0.2]).names(6) == "RRRFFF"
    assert Calls(FIRST, Reverse=[0.3] * 6, Forward=[0.4]).names(6) == "RRRFRR"
    assert Calls(FIRST, Reverse=[0.4] * 6).names(6) == "RRRRRR"
    hopeless = Plan(Reverse(), "made up", 1.0, (), second=Plan(Forward(), "second", 4.0))
    assert Calls(hopeless, Reverse=[0.3] * 6).names(6) == "RRRRRR"


def test_one_disturbed_call_changes_nothing() -> None:
    assert Calls(FIRST, Reverse=[1.0, 50.0, 1.0, 50.0, 50.0]).names(7) == "RRRRRRR"


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Reverse(), "made up", 1.0),
        Plan(Reverse(), "made up", None, (), second=FIRST.second),
        Plan(Reverse(), "made up", 1.0, (), second=Plan(Forward(), "slower still", 7.0)),
    ],
)
def test_nothing_better_is_known(plan: Plan) -> None:
    assert Calls(plan, Reverse=[5.0] * 6).names(6) == "RRRRRR"


def test_a_second_that_is_refused_is_not_tried_again() -> None:
    second = Plan(Forward(), "second", 2.0, (Reverse(),))
    plan = Plan(Reverse(), "made up", 1.0, (), second=second)
    calls = Calls(plan, Reverse=[5.0] * 9)
    tried: list[Plan] = []

    def run(plan: Plan, chunk: Chunk) -> None:
        tried.append(plan)
        if isinstance(plan.strategy, Forward):
            raise Refused("no forward mode")
        calls.now += 5.0

    for _ in range(6):
        by_memory(calls.auto, calls.kind, lambda: (plan, None), run, clock=lambda: calls.now)
    assert sum(isinstance(each.strategy, Forward) for each in tried) == 1
    assert [type(each.strategy) for each in tried[-2:]] == [Reverse, Reverse]


def test_nothing_is_timed_inside_a_transform() -> None:
    calls = Calls(FIRST, Reverse=[9.0] * 6)

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert calls.names(5) == "RRRRR"
        return x

    torch.func.vmap(inside)(torch.zeros(2))


def test_once_timed_the_clock_is_not_asked() -> None:
    calls = Calls(FIRST)
    asked: list[int] = []

    def ask() -> float:
        asked.append(1)
        return 0.0

    alone = Plan(Reverse(), "made up", 1.0)
    for _ in range(6):
        by_memory(calls.auto, calls.kind, lambda: (alone, None), lambda *_: None, clock=ask)
    assert len(asked) == 4  # before and after two calls, the first not among them


def test_the_second_is_of_another_kind_and_has_a_forecast_of_its_own() -> None:
    plan = fastest(invented(100, 100, backward_flop=1.0), (Reverse(), Forward()))
    assert plan.second is not None
    assert (type(plan.strategy), type(plan.second.strategy)) == (Forward, Reverse)
    assert plan.second.seconds is not None
    assert plan.second.seconds > (plan.seconds or 0.0)
    assert plan.second.otherwise == (Forward(),)


def test_within_a_budget_nothing_is_tried() -> None:
    """The second might take more than there is."""
    costs: Costs = invented(100, 100, backward_flop=1.0)
    plan = fastest(costs, (Reverse(), Forward()))
    assert bounded(plan, costs, 10**9).second is plan.second
    assert bounded(plan, costs, 50_000).second is None
    assert bounded_samples(plan, costs, 2, 10**9)[0].second is plan.second
    assert bounded_samples(plan, costs, 2, 100_000)[0].second is None


def test_results_are_the_same_whichever_ran() -> None:
    matrix, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    class Slow(Auto):
        def plan(self, operator: JacobianOperator) -> Plan:
            second = Plan(Forward(), "second", 1e-12)
            return Plan(Reverse(), "made up", 1e-13, (), second=second)

    def func(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(matrix @ x)

    jac, expected = jacfunc.jacobian(func, strategy=Slow()), jacfunc.jacrev(func)(x)

    def ran() -> Iterator[str]:
        for _ in range(4):
            with trail() as steps:
                torch.testing.assert_close(jac(x), expected)
            yield steps[-1] if " ran: " in steps[-1] else steps[-2]

    names = [told.split("(")[0] for told in ran()]
    assert names == ["Reverse", "Reverse", "Reverse", "Forward"]
