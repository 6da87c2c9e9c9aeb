"""What auto chooses, when it thinks again, and what it does where torch refuses."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
import jacfunc.testing
from jacfunc import Forward, Looped, Plan, Reverse, Structured
from jacfunc._forecasting.costs import Costs
from jacfunc._forecasting.machine import SPACIOUS, Cost, Machine
from jacfunc._forecasting.recording import Operation, Recorder
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._log import trail
from jacfunc._planning.auto import Auto
from jacfunc._planning.budget import in_pieces
from jacfunc._planning.choice import SampledWays, fastest
from tests.test_remembered import counting_auto
from tests.truth.oracles import looped_jacobian

FEW_TO_MANY = torch.randn(20_000, 2)


def widening(x: Tensor) -> Tensor:
    return torch.sin(FEW_TO_MANY.to(x) @ x)


def narrowing(x: Tensor) -> Tensor:
    return torch.sin(FEW_TO_MANY.T.to(x) @ x)


class Counted:
    """A function that knows how often it was evaluated."""

    def __init__(self, func: Any) -> None:
        self.func, self.calls = func, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.func(*args, **kwargs)


# --- choosing ---


def test_many_outputs_of_few_inputs_go_forward(device: str) -> None:
    plan = jacfunc.plan(widening, torch.zeros(2, device=device))
    assert isinstance(plan.strategy, Forward | Looped)
    assert plan.strategy != Looped("rows")
    assert "20000 outputs, 2 inputs: forecast" in plan.reason


def test_few_outputs_of_many_inputs_go_in_reverse(device: str) -> None:
    plan = jacfunc.plan(narrowing, torch.zeros(20_000, device=device))
    assert isinstance(plan.strategy, Reverse | Looped)
    assert plan.strategy != Looped("columns")


def test_a_single_output_needs_no_forecast(device: str) -> None:
    plan = jacfunc.plan(lambda x: x.square().sum(), torch.ones(5, device=device))
    assert plan.strategy == Reverse()
    assert plan.seconds is None


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_nothing_to_sweep(shape: tuple[int, ...], device: str) -> None:
    jac = jacfunc.jacobian(lambda x: x * 2)(torch.zeros(shape, device=device))
    assert jac.shape == shape * 2


def invented(rows: int, columns: int, **speeds: float) -> Costs:
    operations = [Operation(read=10, written=10, flops=100)]
    machine: Any = Speeds(**speeds)
    return Costs(operations, rows, columns, [4 * rows * columns], 4 * rows, 4 * rows, machine)


class Speeds(Machine):
    """An invented machine: every call takes a millisecond, an operation nothing."""

    block = 16

    def __init__(
        self, forward_flop: float = 0.0, backward_flop: float = 0.0, large_byte: float = 0.0
    ) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self._flops = {True: forward_flop, False: backward_flop}
        self._large_byte = large_byte
        ways = ("evaluate", "pull", "pull_each", "pull_batch", "push", "push_batch")
        self.know({way: Cost(1e-3, 0.0) for way in ways}, scaling=0.0)

    def flop(self, seeds: int, is_conv: bool, forward: bool) -> float:
        return self._flops[forward]

    def write(self, size: float, most: int = SPACIOUS) -> float:
        return self._large_byte if 5000 < size < 10**7 else 0.0


BOTH = (Reverse(), Forward())


def test_slow_products_decide_the_direction() -> None:
    assert isinstance(fastest(invented(100, 100, forward_flop=1.0), BOTH).strategy, Reverse)
    assert isinstance(fastest(invented(100, 100, backward_flop=1.0), BOTH).strategy, Forward)


def test_results_that_need_fresh_pages_are_taken_in_chunks() -> None:
    rows = (Reverse(),)
    assert fastest(invented(2000, 2000), rows).strategy == Reverse()
    assert fastest(invented(2000, 2000, large_byte=1e-5), rows).strategy == Reverse(128)


def test_a_chunk_that_was_given_stays() -> None:
    given = (Reverse(7), Forward(7))
    assert fastest(invented(100, 100), given).strategy == Reverse(7)


def test_rows_one_by_one_take_what_each_takes_with_its_seed() -> None:
    for rows, seconds in ((1, 2e-3), (100, 1e-3 + 100 * 3e-3)):
        costs = invented(rows, 10)
        costs.speeds.pull_each = Cost(3e-3, 0.0)
        assert costs.seconds(Looped()) == pytest.approx(seconds)


def test_seconds_count_sweeps_and_evaluations() -> None:
    costs = invented(100, 10)
    assert costs.seconds(Reverse()) == pytest.approx(2e-3)
    assert costs.seconds(Reverse(25)) == pytest.approx(5e-3)
    assert costs.seconds(Forward(5)) == pytest.approx(2e-3)
    assert costs.seconds(Looped("rows")) == pytest.approx(101e-3)
    assert costs.seconds(Looped("columns")) == pytest.approx(10e-3)


# --- recording ---


def test_operations_of_an_evaluation(device: str) -> None:
    matrix, x = torch.ones(3, 2, device=device), torch.ones(2, device=device)
    kernel = torch.ones(1, 1, 2, device=device)

    def func(x: Tensor) -> tuple[tuple[Tensor], tuple[()]]:
        constant = torch.sin(matrix).sum()  # depends on no primal
        hidden = 2.0 * (matrix @ x) + constant
        return (torch.conv1d(hidden[None, None], kernel),), ()

    operator = JacobianOperator(func, (x,))
    with Recorder(operator.primals) as recorder:
        outputs = operator.outputs
    assert outputs[0].numel() == 2
    flops = [op.flops for op in recorder.operations if op.flops]
    assert flops == [2 * 3 * 2, 2 * 2 * 2]
    assert [op.is_conv for op in recorder.operations if op.flops] == [False, True]
    assert sum(op.is_scaled for op in recorder.operations) == 1
    assert recorder.live > 0


class SlowAtNewPages(Speeds):
    def write(self, size: float, most: int = SPACIOUS) -> float:
        return 1e-9 if size > most else 0.0


def test_who_writes_large_blocks_by_layers_finds_pages_for_them() -> None:
    """64 MiB: in one block they go where earlier results were, in sixteen they do not."""
    operations = [Operation(read=2**26 // 10, primal_bytes=2**26 // 10)]
    for blocks, by_layers in ([2**26], Structured), ([2**22] * 16, Reverse):
        machine: Any = SlowAtNewPages()
        costs = Costs(operations, 10, 2**24 // 10, blocks, 40, 40, machine)
        assert costs.reuses_pages is (by_layers is Structured)
        assert isinstance(fastest(costs, (Reverse(), Structured())).strategy, by_layers)
        together = costs.times(1, is_copied=True)
        assert isinstance(fastest(together, (Reverse(), Structured())).strategy, Structured)


def test_each_argument_has_a_cotangent_of_its_own() -> None:
    """A sum of two results that just fit into freed memory asks for no new pages."""
    machine: Any = SlowAtNewPages()
    matrix, u = torch.ones(2, 4), torch.ones(4)

    def func(u: Tensor) -> tuple[tuple[Tensor], tuple[()]]:
        return (u.sin() + (matrix @ u.cos()).sum(),), ()

    with Recorder((u,)) as recorder:
        func(u)
    assert [(op.read, op.widest) for op in recorder.operations[-1:]] == [(16 + 4, 16)]
    for widest, seconds in ((SPACIOUS, 0.0), (SPACIOUS + 1, 2e-9 * SPACIOUS)):
        operations = [Operation(read=2 * SPACIOUS, written=SPACIOUS, widest=widest)]
        costs = Costs(operations, 1, 1, [4], 4, 4, machine)
        assert costs.seconds(Reverse()) - costs.evaluation() == pytest.approx(1e-3 + seconds)


def test_a_sum_is_swept_backward_in_chunks_that_fit_into_freed_memory() -> None:
    """Cotangents of both terms together do not; forward mode would have just one tangent."""
    term = SPACIOUS // 128
    operations = [Operation(read=2 * term, written=term, widest=term)]
    machine: Any = SlowAtNewPages()
    costs = Costs(operations, 2000, 2000, [4], 4, 4, machine)
    assert fastest(costs, BOTH).strategy == Reverse(128)


def test_a_convolution_of_few_channels_is_filled_up_with_zeros() -> None:
    """A pullback multiplies zeros of both sides, a pushforward those that come out alone."""
    one, many = (Operation(read=8, written=4, channels=size) for size in ((1, 4), (32, 16)))
    assert one.filled_up(16, True) == (4, 16)
    assert one.filled_up(16, False) == (64, 128)
    assert one.filled_up(1, False) == (1, 8)
    assert many.filled_up(16, True) == (1, 4)
    assert many.filled_up(16, False) == (1, 8)


def test_a_convolution_is_swept_in_chunks_that_fit_into_freed_memory_with_their_zeros() -> None:
    """Of 32² numbers in one channel 1024 take 4 MiB, and 64 MiB with fifteen channels of zeros."""
    machine: Any = SlowAtNewPages()
    for channels, chunk in ((1, 205), (16, 512), (0, 512)):
        images = Operation(read=2**12, written=2**12, flops=1, channels=(channels, channels))
        costs = Costs([images], 1024, 1024, [4], 4, 4, machine)
        assert fastest(costs, (Forward(),)).strategy == Forward(chunk)
        assert fastest(costs, (Reverse(),)).strategy == Reverse(chunk)


def test_rows_of_a_product_with_a_vector_take_as_long_as_many() -> None:
    machine: Any = Speeds()
    machine.few_products = 1e-6
    product = Operation(flops=200, by_vector=True)
    for rows, seconds in ((1, 0.0), (2, 1e-4), (15, 1e-4), (16, 0.0)):
        costs = Costs([product], rows, 10, [4], 4, 4, machine)
        assert costs.seconds(Reverse()) - 2e-3 == pytest.approx(seconds)


def test_rows_that_lie_a_page_apart_take_longer() -> None:
    machine: Any = Speeds()
    machine.few_products = 1e-6
    for row_bytes, seconds in ((4 * 1000, 1e-4), (4 * 1024, 1.7e-4), (4 * 2048, 1.7e-4)):
        product = Operation(flops=200, by_vector=row_bytes)
        costs = Costs([product], 4, 10, [4], 4, 4, machine)
        assert costs.seconds(Reverse()) - 2e-3 == pytest.approx(seconds)


def test_loops_of_few_rows_come_into_question_where_products_with_vectors_are_pulled_back() -> None:
    machine: Any = Speeds()
    for by_vector, most in ((True, 16), (False, 1)):
        product = Operation(flops=200, by_vector=by_vector)
        assert Costs([product], 4, 10, [4], 4, 4, machine).most_loops == most


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_a_few_rows_of_a_wide_function_are_looped(width: int) -> None:
    """Of one that is no wider than its layers, all are pulled back at once."""
    first, second, last = torch.ones(64, width), torch.ones(64, 64), torch.ones(4, 64)

    def func(x: Tensor) -> Tensor:
        return last @ torch.tanh(second @ torch.tanh(first @ x))

    with jacfunc.testing.known_machine():
        plan = jacfunc.plan(func, torch.zeros(width))
    assert plan.strategy == (Looped("rows") if width == 1024 else Reverse())


def test_products_with_a_vector_are_recorded_as_such() -> None:
    matrix, x = torch.ones(3, 2), torch.ones(2)
    with Recorder((x,)) as recorder:
        (matrix @ x).sum() + x.dot(x) + (matrix @ x[:, None]).sum()
    products = [op.by_vector for op in recorder.operations if op.flops]
    assert products == [2 * 4, 0, 0]


HEAT = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def test_a_stencil_by_convolution_is_planned_in_such_chunks() -> None:
    def heat(u: Tensor) -> Tensor:
        return nn.functional.conv2d(u[None, None], HEAT[None, None], padding=1)[0, 0] + u.sin()

    with jacfunc.testing.known_machine():
        plan = jacfunc.plan(heat, torch.zeros(32, 32))
    assert plan.strategy == Forward(205)


def test_a_batch_scales_bytes_and_products_alone() -> None:
    costs = invented(3, 4)
    costs = replace(costs, operations=[replace(costs.operations[0], widest=5)])
    every = costs.times(8)
    assert every.operations == [Operation(read=80, written=80, flops=800, widest=40)]
    assert (every.result, every.rows, every.columns) == (8 * costs.result, 3, 4)


# --- remembering ---


def test_a_kind_of_call_is_planned_once(device: str) -> None:
    auto, plans = counting_auto()
    jac = jacfunc.jacobian(torch.sin, strategy=auto)
    for size in (2, 2, 3, 2):
        jac(torch.zeros(size, device=device))
    assert len(plans) == 2
    jac(torch.zeros(2, device=device, dtype=torch.float64))
    torch.func.vmap(jac)(torch.zeros(5, 2, device=device))
    torch.func.vmap(jac)(torch.zeros(6, 2, device=device))
    assert len(plans) == 5


def test_settings_are_part_of_the_kind(device: str) -> None:
    auto, plans = counting_auto()
    jac = jacfunc.jacobian(lambda x, n, *, flag: x * n, strategy=auto)
    x = torch.ones(2, device=device)
    jac(x, 2, flag=True), jac(x, 2, flag=True), jac(x, 3, flag=True), jac(x, 2, flag=False)
    assert len(plans) == 3


def test_planning_costs_no_evaluation_but_where_columns_are_swept(device: str) -> None:
    x = torch.zeros(30, device=device)
    func = Counted(lambda x: x[:3].sin())
    jac = jacfunc.jacobian(func)
    for number in (1, 2, 3):
        jac(x)
        assert func.calls == number
    func = Counted(widening)
    jac = jacfunc.jacobian(func)
    x = torch.zeros(2, device=device)
    jac(x)
    first = func.calls
    jac(x)
    assert first == func.calls - first + 1


def test_auto_draws_what_its_strategy_draws(device: str) -> None:
    def func(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    x, by_auto = torch.ones(40, device=device), jacfunc.jacobian(func)
    for _ in range(2):
        torch.manual_seed(1)
        expected = jacfunc.jacrev(func)(x)
        after = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(by_auto(x), expected)
        assert torch.equal(torch.rand(1), after)


# --- pinning ---


@pytest.mark.parametrize("strategy", ["auto", "reverse", "forward", "looped", "autotune"])
def test_a_plan_is_a_strategy(strategy: str) -> None:
    x = torch.randn(4, dtype=torch.float64)
    plan = jacfunc.plan(torch.tanh, x, strategy=strategy)
    assert isinstance(plan, Plan)
    assert plan.forecast is not None
    assert plan.forecast.result_bytes == 8 * 16
    expected = looped_jacobian(torch.tanh, (x,))
    for derive in (jacfunc.jacobian, jacfunc.hessian, jacfunc.value_and_jacobian):
        derive(torch.tanh, strategy=plan)(x)
    torch.testing.assert_close(jacfunc.jacobian(torch.tanh, strategy=plan)(x), expected)
    assert jacfunc.plan(torch.tanh, x, strategy=plan).strategy == plan.strategy


def test_a_plan_of_a_function_that_cannot_be_faked() -> None:
    def func(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x

    plan = jacfunc.plan(func, torch.ones(3))
    assert plan.strategy == Reverse()
    assert plan.forecast is not None
    assert "can't be run on fakes" in plan.forecast.reason


def test_a_plan_goes_on_where_torch_refuses() -> None:
    plan = Plan(Forward(), "made up", otherwise=(Reverse(),))
    matrix = torch.eye(2, dtype=torch.float64) * 2
    with trail() as steps:
        jac = jacfunc.jacobian(torch.cholesky_inverse, strategy=plan)(matrix)
    torch.testing.assert_close(jac, jacfunc.jacrev(torch.cholesky_inverse)(matrix))
    assert len(steps) == 1
    assert "was refused: torch's forward mode of cholesky_inverse is wrong" in steps[0]


def test_a_plan_without_a_way_out_raises_the_refusal() -> None:
    plan = Plan(Forward(), "made up")
    with pytest.raises(NotImplementedError, match=r"jacobian: .*cholesky_inverse is wrong"):
        jacfunc.jacobian(torch.cholesky_inverse, strategy=plan)(torch.eye(2))


def test_a_refusal_is_met_once(device: str) -> None:
    def func(x: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.eye(2).to(x) * x).flatten().repeat(20_000)

    jac = jacfunc.jacobian(func, strategy=Auto((Forward(), Reverse(512))))
    x = torch.full((1,), 2.0, device=device)
    with trail() as steps:
        first = jac(x)
    assert any("was refused: torch's forward mode" in step for step in steps)
    with trail() as steps:
        torch.testing.assert_close(jac(x), first)
    assert len(steps) == 1
    assert steps[0].startswith("Reverse(chunk_size=512) ran: Forward was refused")


# --- saying ---


def test_the_log_says_what_ran_and_why(caplog: pytest.LogCaptureFixture, device: str) -> None:
    jac = jacfunc.jacobian(torch.sin)
    with caplog.at_level(logging.INFO, "jacfunc"):
        jac(torch.zeros(3, device=device))
    assert "Reverse(chunk_size=None) ran: 3 outputs, 3 inputs: forecast" in caplog.text
    assert "; took" in caplog.text


def test_explain_puts_the_forecast_beside_what_was_seen() -> None:
    matrix = torch.randn(200, 100)
    told = jacfunc.explain(lambda x: torch.tanh(matrix @ x), torch.randn(100))
    foretold = told.plan.forecast
    assert foretold is not None
    assert foretold.peak_bytes == told.peak_bytes
    assert told.seconds > 0
    lines = repr(told).split("\n")
    assert lines[0].startswith("Reverse(chunk_size=None): 200 outputs, 100 inputs")
    assert "forecast" in lines[-1]
    assert "seen" in lines[-1]
    assert "<table><caption>Reverse(" in told._repr_html_()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_products_with_sparse_matrices_are_planned() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    matrix, x = dense.to_sparse_csr(), torch.tensor([0.1, 0.2, 0.3])
    jacobian = jacfunc.jacobian(lambda x: (matrix @ x).sin(), memory="1 MB")(x)
    torch.testing.assert_close(jacobian, (dense @ x).cos()[:, None] * dense)


def test_explain_keeps_to_the_budget_that_it_foretells() -> None:
    matrix = torch.randn(300, 300)
    told = jacfunc.explain(lambda x: torch.tanh(matrix @ x), torch.randn(300), memory="1 MB")
    foretold = told.plan.forecast
    assert foretold is not None
    assert foretold.peak_bytes is not None
    assert max(told.peak_bytes, foretold.peak_bytes) <= 1_000_000


def test_explain_tells_what_was_tried() -> None:
    told = jacfunc.explain(
        torch.cholesky_inverse, torch.eye(2), strategy=Plan(Forward(), "", None, (Reverse(),))
    )
    assert "Forward(chunk_size=None, randomness='same') was refused" in told.steps[0]
    assert "  then: " in repr(told)


# --- per sample ---


@pytest.mark.parametrize("strategy", ["auto", "autotune"])
def test_ways_that_samples_refused_are_not_tried_again(strategy: str, device: str) -> None:
    class OfOne(nn.Module):
        """Takes one sample alone, and reads its numbers."""

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 1
            return x * 2 if x.sum().item() > 0 else x.exp()

    x = torch.randn(2, 3, device=device)
    derive = jacfunc.module_jacobian(OfOne(), "inputs", per_sample=True, strategy=strategy)
    with trail() as steps:
        first = derive(x)
    assert any(step.startswith("samples are not evaluated as a whole: ") for step in steps)
    assert any(step.startswith("samples are not evaluated under vmap: ") for step in steps)
    with trail() as steps:
        torch.testing.assert_close(derive(x), first)
    assert not any("not evaluated" in step for step in steps)


def test_the_log_says_how_many_samples_went_at_once(device: str) -> None:
    model = nn.Linear(3, 2).to(device)
    x = torch.randn(4, 3, device=device)
    with trail() as steps:
        jacfunc.module_jacobian(model, per_sample=True)(x)
    assert steps[-1].startswith("all samples at once, each: Reverse(chunk_size=None): 2 outputs")


def image_net() -> nn.Module:
    """Convolutions, normalized over groups: of a row of a sample a graph keeps 0.4 MB."""
    first = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()
    second = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()
    return nn.Sequential(*first, *second, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(784, 10))


def test_one_row_of_many_samples_is_swept_instead_of_all_rows_of_few() -> None:
    """It takes as many sweeps, of which none is vmapped, and one evaluation instead of four."""
    torch.manual_seed(0)
    model, x = image_net().double(), torch.randn(40, 1, 28, 28, dtype=torch.float64)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    compute = jacfunc.module_jacobian(model, "inputs", per_sample=True, independent=True)
    for _ in range(2):
        forwards.clear()
        with trail() as steps:
            found = compute(x)
    assert "all samples at once, each: Reverse(chunk_size=1)" in steps[-1]
    assert forwards == [40]
    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for y in model(leaf).unbind(1)]
    torch.testing.assert_close(found, torch.stack(rows, 1))


def pieces_of(size: int, has_layers: bool = False, **sizes: int) -> tuple[Plan, int | None]:
    """A plan for twelve of so many samples at once."""
    one = replace(invented(sizes.pop("rows", 10), 784), **{"kept": 2**17, **sizes})
    samples = SampledWays(size, has_layers, are_copied=False, may_be_whole=True)
    return in_pieces(Plan(Reverse(), "made up"), samples, one, 12)


def test_pieces_of_one_row_hold_as_much_as_pieces_of_all_rows() -> None:
    assert pieces_of(100)[1] is None
    for size, chunk in ((121, 61), (240, 120), (400, 100)):
        plan, at_once = pieces_of(size)
        assert (plan.strategy, at_once) == (Reverse(1), chunk)
    assert pieces_of(60, rows=3)[1] == 30
    assert pieces_of(130, rows=40)[1] == 65  # at most ten times as many


def test_pieces_stay_as_they_are_where_more_samples_would_take_too_much() -> None:
    """By layers, beside a large result, and where the graph of a few samples is large."""
    for plan, at_once in (
        pieces_of(100, has_layers=True),
        pieces_of(1000),
        pieces_of(100, kept=2**23),
        pieces_of(100, rows=1),
    ):
        assert (plan.strategy, at_once) == (Reverse(), 12)
    assert pieces_of(100, kept=2**21)[1] == 25
