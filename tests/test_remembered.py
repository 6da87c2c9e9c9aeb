"""What is found out is kept by function or module and kind of call, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc import Forward, Looped, Reverse, Structured
from jacfunc._calls import Derivation, FlatCall
from jacfunc._forecasting.costs import counted_costs
from jacfunc._lending.constants import constants_of
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._log import trail
from jacfunc._memory import PeakBytes
from jacfunc._planning.auto import Auto
from jacfunc._planning.budget import bounded
from jacfunc._planning.plan import Plan, alternatives
from jacfunc._planning.recall import _codes
from jacfunc._planning.tuning_cache import Winners
from jacfunc._remembered import MOST_KINDS, Recent, Remembered
from tests.kinds.losses import half_square


class AllEqual(nn.Module):
    """Equal to every other one, and of one hash."""

    def __init__(self, is_read: bool = False) -> None:
        super().__init__()
        self.layer, self.is_read = nn.Linear(3, 2), is_read

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out * (2 if self.is_read and out.sum().item() > 0 else 3)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllEqual)

    def __hash__(self) -> int:
        return 1


def points(count: int = 5) -> Tensor:
    return torch.linspace(-1, 1, 3 * count).view(count, 3)


# --- the memory itself ---


def test_by_identity_and_kind() -> None:
    memory: Remembered[int] = Remembered()
    one, other = AllEqual(), AllEqual()
    memory.put(one, "kind", 1)
    assert (memory.get(one, "kind"), memory.get(one, "other")) == (1, None)
    assert memory.get(other, "kind") is None
    assert constants_of(one) is constants_of(one)
    assert constants_of(one) is not constants_of(other)


def test_what_has_no_hash_is_remembered_and_what_has_no_weak_reference_is_not() -> None:
    class NoHash:
        __hash__ = None  # type: ignore[assignment]

    memory: Remembered[int] = Remembered()
    unhashable, number = NoHash(), 10**9
    memory.put(unhashable, "kind", 1)
    memory.put(number, "kind", 2)
    assert memory.get(unhashable, "kind") == 1
    assert memory.get(number, "kind") is None


def test_it_ends_with_what_is_called() -> None:
    memory: Remembered[int] = Remembered()
    one = AllEqual()
    memory.put(one, "kind", 1)
    assert memory.values() == [1]
    del one
    assert memory.values() == []


def test_the_oldest_kinds_are_forgotten() -> None:
    memory, one = Remembered[int](3), AllEqual()
    for number in range(5):
        memory.put(one, number, number)
    assert memory.values() == [2, 3, 4]
    recent = Recent[int](2)
    for number in (1, 2, 1, 3):
        recent.put(number, number)
    assert list(recent) == [2, 3]


@pytest.mark.parametrize("strategy", [Auto(), jacfunc.Autotune(), Structured(), Auto(memory=10**9)])
def test_strategies_are_values_and_remember_nothing_themselves(strategy: Any) -> None:
    module, options = nn.Linear(3, 2), {field.name for field in fields(strategy)}
    expected = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(points())
    for copied in (strategy, copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert copied == strategy
        assert vars(copied).keys() == options
        found = jacfunc.module_jacobian(module, per_sample=True, strategy=copied)(points())
        torch.testing.assert_close(found, expected)


def test_what_is_made_is_remembered() -> None:
    memory, one = Remembered[list[int]](), AllEqual()
    made = memory.get_or_make(one, "kind", list)
    assert memory.get_or_make(one, "kind", list) is made
    assert memory.get_or_make(one, "other", list) is not made


# --- the identity of a call ---


def flat(func: Any, *args: Any, **kwargs: Any) -> FlatCall:
    return FlatCall(Derivation("test", func), args, kwargs)


def test_an_operator_has_the_identity_of_the_call_below() -> None:
    call = flat(torch.sin, torch.zeros(2))
    operator = JacobianOperator(call, call.primals)
    assert operator.call_kind is call.call_kind
    assert call.call_kind == flat(torch.sin, torch.ones(2)).call_kind
    inside: list[Any] = []
    torch.func.vmap(lambda x: inside.append(operator.call_kind) or x)(torch.zeros(3))
    assert inside[0] != call.call_kind
    assert inside[0].callable is torch.sin


def test_calls_that_cost_other_than_this_one_are_of_other_kinds() -> None:
    x, double = torch.zeros(2), torch.zeros(2).double()
    calls = [
        flat(torch.sin, x),
        flat(torch.cos, x),
        flat(torch.sin, torch.zeros(3)),
        flat(torch.sin, double),
        flat(torch.sin, x, out=None),
        flat(torch.pow, x, 2),
        flat(torch.pow, x, 3),
    ]
    assert len({call.call_kind for call in calls}) == len(calls)


# --- plans ---


def counting_auto(memory: int | None = None) -> tuple[Auto, list[Plan]]:
    """A strategy that is equal to none before, and the plans that it makes."""
    plans: list[Plan] = []

    class Counting(Auto):
        def plan(self, operator: JacobianOperator) -> Plan:
            plans.append(super().plan(operator))
            return plans[-1]

    return Counting(memory=memory), plans


def test_as_many_plans_as_are_kept() -> None:
    auto, plans = counting_auto()
    jac = jacfunc.jacobian(torch.tanh, strategy=auto)
    for size in range(1, MOST_KINDS + 20):
        jac(torch.zeros(size))
    assert len(plans) == MOST_KINDS + 19
    jac(torch.zeros(MOST_KINDS + 19)), jac(torch.zeros(20))
    assert len(plans) == MOST_KINDS + 19
    jac(torch.zeros(19))
    assert len(plans) == MOST_KINDS + 20


@pytest.mark.parametrize(("memory", "count"), [(None, 1), (10**9, 3)])
def test_strategies_that_are_equal_plan_once_unless_in_a_budget(
    memory: int | None, count: int
) -> None:
    """Functions of one code may need more, by what they find in globals."""
    auto, plans = counting_auto(memory)
    for strategy in (auto, copy.deepcopy(auto), replace(auto)):
        for _ in range(2):
            jacfunc.jacobian(torch.expm1, strategy=strategy)(torch.zeros(3))
    assert len(plans) == count


def test_transforms_of_a_module_within_one_budget_share_a_plan() -> None:
    module, plans = nn.Linear(3, 2), list[Plan]()

    class Counting(Auto):
        def plan(self, operator: JacobianOperator) -> Plan:
            plans.append(super().plan(operator))
            return plans[-1]

    for memory, count in ((10**6, 1), (10**6, 1), (2000, 2), (2000, 2)):
        strategy = Counting(memory=memory)
        jacfunc.module_jacobian(module, strategy=strategy)(points(12))
        assert len(plans) == count


def test_a_plan_for_the_memory_that_was_free_serves_one_strategy() -> None:
    plans: list[Plan] = []

    class Scarce(Auto):
        def plan(self, operator: JacobianOperator) -> Plan:
            costs = counted_costs(operator.unevaluated())
            assert costs is not None
            plans.append(bounded(super().plan(operator), costs, 2**20))
            return plans[-1]

    auto = Scarce()
    for strategy in (auto, auto, replace(auto)):
        jacfunc.jacobian(torch.exp2, strategy=strategy)(torch.zeros(400))
    assert len(plans) == 2
    assert all("chunks within 1 MiB" in plan.reason for plan in plans)


def test_many_functions_of_one_code_are_planned_once() -> None:
    def made() -> Callable[[Tensor], Tensor]:
        return lambda x: torch.sin(x.expand(300, 3))

    plans = [Auto() for _ in range(2)]
    with trail() as steps:
        for auto in plans:
            jacfunc.jacobian(made(), strategy=auto)(torch.zeros(3))
    first, second = (step.split(";")[0] for step in steps if " ran: " in step)
    assert first == second
    assert _codes().most == 1000


def test_a_shared_strategy_measures_each_function() -> None:
    tune = jacfunc.Autotune()
    matrix = torch.randn(2000, 2)
    wide, narrow = jacfunc.jacobian, jacfunc.jacobian
    with trail() as steps:
        wide(lambda x: torch.sin(matrix @ x), strategy=tune)(torch.zeros(2))
        narrow(lambda x: torch.sin(x).repeat(3), strategy=tune)(torch.zeros(2))
    assert sum(step.startswith("measured: ") for step in steps) == 2


@pytest.mark.parametrize("strategy", [Auto(by_layers=Structured()), jacfunc.Autotune()])
def test_what_one_module_does_under_vmap_is_no_other_modules(strategy: Any) -> None:
    for module in AllEqual(is_read=True), AllEqual():
        derive = jacfunc.module_jacobian(
            module, ("params", "inputs"), per_sample=True, strategy=strategy
        )
        with trail() as steps:
            derive(points() * 0), derive(points() * 0)
        assert any(") was refused" in step for step in steps) == module.is_read


def test_one_strategy_for_several_doors_of_one_module() -> None:
    module, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        points().double(),
    )
    for strategy in (Auto(by_layers=Structured()), jacfunc.Autotune(), Structured()):
        for select in (None, "2.*", "0.weight", ["0.bias", "2.weight"]):
            found = jacfunc.module_jacobian(
                module, select=select, per_sample=True, strategy=strategy
            )
            plain = jacfunc.module_jacobian(
                module, select=select, per_sample=True, strategy="looped"
            )(x)
            for blocks in (found(x), found(x)):
                for name, block in plain.items():
                    torch.testing.assert_close(blocks[name], block)


def test_a_plan_serves_the_next_transform_of_a_module() -> None:
    module = AllEqual(is_read=True)
    for number in range(2):
        with trail() as steps:
            jacfunc.module_jacobian(module, ("params", "inputs"), per_sample=True)(points() * 0)
        assert any(") was refused" in step for step in steps) == (number == 0)


def test_winners_in_memory_are_the_latest() -> None:
    winners, cpu = Winners(None), torch.device("cpu")
    for number in range(1200):
        winners.put(cpu, str(number), Reverse(), 1.0)
    assert winners.get(cpu, "0") is None
    assert winners.get(cpu, "1199") == Reverse()


# --- what parameters meet ---


def test_a_module_that_begins_to_write_does_not_write_into_its_parameters() -> None:
    """They are lent as they are to one that has only read them, by any strategy that is equal."""
    module, x = nn.Linear(3, 2), points()

    def transform() -> Callable[..., Any]:
        return jacfunc.module_jacobian(module, per_sample=True, strategy=Structured())

    first = transform()
    expected = first(x)

    def write(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(2.0)

    module.register_forward_pre_hook(write)
    before = module.weight.detach().clone()
    for jac in (first, transform()):
        torch.testing.assert_close(jac(x)["bias"], expected["bias"])
        assert torch.equal(module.weight, before)


# --- nothing is kept alive ---


def vector(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in module.named_parameters()}


def products(module: nn.Module, x: Tensor) -> Any:
    G = jacfunc.ggn(module, half_square)(x, torch.zeros(len(x), 2))
    return [G @ vector(module) for _ in range(3)]


def refused_under_vmap(module: Any, x: Tensor) -> Any:
    module.is_read = True
    return jacfunc.module_jacobian(module, "inputs", per_sample=True)(x * 0)


KEPT: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "products": products,
    "diagonal": lambda m, x: jacfunc.ggn(m, half_square)(x, torch.zeros(len(x), 2)).diagonal(),
    "refused under vmap": refused_under_vmap,
    "plan": jacfunc.plan,
    "explain": jacfunc.explain,
    "estimate": jacfunc.estimate,
    "autotune": lambda m, x: jacfunc.jacobian(m, strategy="autotune")(x),
    "ntk": lambda m, x: jacfunc.ntk(m, None, x, chunk_size=2),
    "gradient norms": lambda m, x: jacfunc.gradient_norms(m, half_square)(
        x, torch.zeros(len(x), 2)
    ),
    "samples": lambda m, x: jacfunc.module_jacobian(m, per_sample=True)(x),
    "whole": lambda m, x: jacfunc.module_jacobian(m)(x),
    "stream": lambda m, x: list(jacfunc.stream_jacobian(m, per_sample=True)(x)),
    "hessian": lambda m, x: jacfunc.hessian(lambda x: m(x).sum())(x),
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("what", KEPT)
def test_modules_and_batches_end_with_the_last_reference(what: str, uncollected: None) -> None:
    KEPT[what](AllEqual(), points())  # what is set up at the first call is nobody's
    module, x = AllEqual(), points()
    alive = weakref.ref(module), weakref.ref(x), weakref.ref(module.layer.weight)
    KEPT[what](module, x)
    del module, x
    assert [reference() for reference in alive] == [None, None, None]


# --- what is tried where a way is refused ---


def test_the_seeds_of_what_is_tried_take_no_more_than_the_result() -> None:
    both = (Reverse(), Forward())
    assert alternatives(Reverse(), both, 10, 10) == (Forward(),)
    assert alternatives(Reverse(), both, 2, 200_000) == (Forward(2),)
    assert alternatives(Forward(), both, 80_000, 1) == (Reverse(104),)
    assert alternatives(Forward(), both, 100, 10) == (Reverse(),)
    assert alternatives(Looped("rows"), (*both, Structured()), 2, 50) == (
        Reverse(),
        Structured(),
        Forward(2),
    )
    assert alternatives(Reverse(7), (Reverse(7), Forward(7)), 2, 50) == (Forward(7),)


class Read(nn.Module):
    """Its course depends on numbers, which nothing vmapped has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(60, 40)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return h[:, :2] * (2 if h.isfinite().all().item() else 3)


class UnforeseenError(Exception):
    """An error of a user's own."""


def raising(error: type[Exception]) -> Any:
    """An operation whose backward pass takes one cotangent at a time, and raises its own error."""

    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 3 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise error("one at a time")
            return 3 * g

    return Raising


ERRORS = (ValueError, TypeError, KeyError, RuntimeError, UnforeseenError)


class Tripled(nn.Module):
    """Sixty parameters for each of its numbers, through an operation that vmap does not take."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.layer, self.operation = nn.Linear(60, 40), raising(error)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.operation.apply(self.layer(x))
        return h[:, :2]


@pytest.mark.parametrize("strategy", ["auto", "autotune"])
def test_samples_that_are_not_vmapped_go_by_rows(strategy: str) -> None:
    with trail() as steps:
        jacfunc.module_jacobian(Read(), per_sample=True, strategy=strategy)(torch.ones(2, 60))
    assert any(") was refused" in step for step in steps)
    assert not any("Forward" in step or "go one by one" in step for step in steps)


@pytest.mark.parametrize("strategy", ["auto", "autotune", "reverse"])
def test_a_backward_pass_that_raises_under_vmap_goes_by_rows(strategy: str) -> None:
    x = torch.ones(500)
    with trail() as steps:
        jac = jacfunc.jacobian(lambda x: raising(ValueError).apply(x)[:3], strategy=strategy)(x)
    torch.testing.assert_close(jac, 3 * torch.eye(500)[:3])
    assert not any("Forward" in step for step in steps)


def test_rows_that_go_one_by_one_take_no_second_result() -> None:
    x = torch.ones(10_000)
    jac = jacfunc.jacobian(lambda x: raising(ValueError).apply(x)[:32], strategy=Auto())
    jac(x)
    with PeakBytes() as counter:
        result = jac(x)
    assert counter.peak < 1.2 * result.nbytes


@pytest.mark.parametrize("door", ["whole", "samples", "flat"])
@pytest.mark.parametrize("module", [Read(), *map(Tripled, ERRORS)], ids=lambda m: type(m).__name__)
def test_no_module_is_swept_by_its_parameters(module: nn.Module, door: str) -> None:
    """Two rows of a sample, 2440 parameters; another transform knows what the first has learned."""
    x = torch.linspace(-1, 1, 720).view(12, 60)
    options: dict[str, Any] = {"per_sample": door != "whole", "flat": door == "flat"}
    params = list(module.parameters())
    expected = torch.stack(
        [
            torch.cat(
                [grad.flatten() for grad in torch.autograd.grad(out, params, retain_graph=True)]
            )
            for out in (row for sample in x for row in module(sample[None])[0])
        ]
    )
    for number in range(2):
        jac = jacfunc.module_jacobian(module, independent=door != "whole" or None, **options)
        with trail() as steps, PeakBytes() as counter:
            found = jac(x)
        assert not any("Forward" in step for step in steps)
        if number:
            assert not any(") was refused" in step for step in steps)
        assert counter.peak <= 2 * expected.nbytes
        rows = (
            found
            if door == "flat"
            else torch.cat([block.flatten(2) for block in found.values()], 2)
        )
        torch.testing.assert_close(rows.flatten(0, 1), expected)


EVALUATED: list[int] = []
"""The samples of each evaluation of :class:`Last`, which a module's own attributes would forget."""


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 8, batch_first=True)

    def forward(self, steps: Tensor) -> Tensor:
        EVALUATED.append(len(steps))
        last: Tensor = self.layer(steps)[0][:, -1, :2]
        return last


def test_a_recurrent_layer_of_one_sample_is_planned_once() -> None:
    module, counts = Last(), []
    for _ in range(3):
        EVALUATED.clear()
        with trail() as steps:
            jac = jacfunc.module_jacobian(module, per_sample=True, independent=True)
            jac(torch.ones(1, 5, 3))
        assert not any("Forward" in step or "refused" in step for step in steps)
        counts.append(len(EVALUATED))
    assert counts == [2, 1, 1]  # the first time one sample is tried alone before
