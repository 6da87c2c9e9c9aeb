"""A forecast runs on shapes alone, and says what the real run then takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import jacfunc
from jacfunc import Estimate, estimate
from jacfunc._calls.derivation import Derivation
from jacfunc._forecasting.call_forecast import CallForecast
from jacfunc._forecasting.costs import counted_costs
from jacfunc._forecasting.machines import machine
from jacfunc._forecasting.on_fakes import Forecast
from jacfunc._forecasting.recording import Recorder
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._memory.counting import PeakBytes
from tests.kinds.problems import PROBLEMS, Problem

TOLERANCE = 0.05


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).requires_grad_(False)


def mlp(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    module = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 24))
    return frozen(module, dtype), torch.randn(48, dtype=dtype)


def trained_mlp(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    """Its parameters require grad, so that every product keeps its graph."""
    module = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 24))
    return module.to(dtype), torch.randn(20, dtype=dtype)


def cnn(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    )
    return frozen(module, dtype), torch.randn(2, 2, 8, 8, dtype=dtype)


def attention(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    project = frozen(nn.Linear(8, 24), dtype)

    def func(x: Tensor) -> Tensor:
        query, key, value = project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(query, key, value)

    return func, torch.randn(1, 2, 5, 8, dtype=dtype)


def stencil(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    def func(u: Tensor) -> Tensor:
        padded = F.pad(u, (1, 1))
        return padded[2:] - 2 * u + padded[:-2] + u**3

    return func, torch.randn(60, dtype=dtype)


def matmul(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    left, right = torch.randn(9, 7, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    return lambda x: torch.tanh(left @ x @ right), torch.randn(7, 6, dtype=dtype)


def mixed(dtype: torch.dtype) -> tuple[Callable[..., Any], Tensor]:
    """Blocks are promoted: the products are copied."""
    other = torch.float32 if dtype == torch.float64 else torch.float64
    return lambda x: (x.to(other) ** 2, x.sum()), torch.randn(40, dtype=dtype)


FUNCTIONS = [mlp, trained_mlp, cnn, attention, stencil, matmul, mixed]


def assert_foretold(row: Forecast, compute: Callable[[], Any], slack: int = 0) -> None:
    """Peak bytes and FLOPs of the real run; counted apart, as torch's counter keeps seeds alive."""
    with FlopCounterMode(display=False) as work:
        compute()  # what torch allocates once is not the Jacobian's: memory comes after
    assert row.flops == work.get_total_flops()
    gc.collect()
    with PeakBytes() as memory:
        compute()
    assert row.peak_bytes is not None
    difference = abs(row.peak_bytes - memory.peak)
    assert difference <= TOLERANCE * memory.peak + slack, row.peak_bytes / memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_peak_bytes_and_flops_are_those_of_the_real_run(
    make: Callable[..., Any], chunk_size: int | None, dtype: torch.dtype
) -> None:
    func, x = make(dtype)
    for row in estimate(func, x, chunk_size=chunk_size):
        assert_foretold(row, lambda row=row: jacfunc.jacobian(func, strategy=row.strategy)(x))


IN_TABLE = [
    problem
    for problem in PROBLEMS
    if problem.forward_refuses is None and problem.name != "data_dependent"
][::8]


@pytest.mark.parametrize("problem", IN_TABLE, ids=lambda problem: problem.name)
def test_the_table_of_problems(problem: Problem) -> None:
    args = problem.make_args("cpu", torch.float64)
    found = estimate(problem.func, *args, argnums=problem.argnums, chunk_size=2, **problem.kwargs)
    for row in found:
        derive = jacfunc.jacobian(problem.func, problem.argnums, strategy=row.strategy)
        # a literal inside the function is counted when it is fake, and else missed
        assert_foretold(row, lambda derive=derive: derive(*args, **problem.kwargs), slack=64)


def test_evaluations_and_sweeps_are_counted_through_to_the_end() -> None:
    calls = 0

    def func(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.outer(x, x)[:, :7].sin()

    x = torch.randn(10)
    for row in estimate(func, x, chunk_size=3):
        calls = 0
        jacfunc.jacobian(func, strategy=row.strategy)(x)
        assert row.evaluations == calls
    found = estimate(func, x, chunk_size=3)
    assert [row.sweeps for row in found] == [24, 4, 70]
    assert all(row.result_bytes == 4 * 70 * 10 for row in found)


def test_inference_mode_counts_the_same() -> None:
    module, x = mlp(torch.float32)
    with torch.inference_mode():
        for row in estimate(module, x, chunk_size=5):
            assert_foretold(row, lambda row=row: jacfunc.jacobian(module, strategy=row.strategy)(x))


# --- nothing is run ---


def test_what_is_larger_than_the_machine() -> None:
    n = 100_000
    matrix = torch.empty(n, n, device="meta")
    found = estimate(lambda x: torch.tanh(matrix @ x), torch.empty(n, device="meta"), chunk_size=64)
    assert [row.result_bytes for row in found] == [4 * n * n] * 3
    reverse = found["reverse"]
    assert reverse.sweeps == -(-n // 64)
    assert reverse.flops == 2 * n**3
    assert reverse.peak_bytes is not None
    assert 4 * n * n < reverse.peak_bytes < 1.01 * 4 * n * n


def test_seeds_too_large_to_have_a_size() -> None:
    huge = torch.empty(2**31, device="meta")
    found = estimate(lambda x: x.sum(), huge)
    assert "no size in 64 bits" in found["forward"].reason
    assert found["reverse"].result_bytes == 4 * 2**31


def test_func_never_meets_a_real_tensor_and_nothing_changes() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, scale, state = torch.randn(5, 4), torch.tensor(2.0), torch.get_rng_state()
    met: list[Tensor] = []

    def func(x: Tensor, scale: Tensor, *, tree: dict[str, Tensor]) -> Tensor:
        met.extend([x, scale, *tree.values()])
        result = module(x) * scale * tree["a"]
        met.append(result)
        return x.mul_(0.0).sum() + result

    estimate(func, x, scale, tree={"a": torch.ones(3)})
    assert met
    for tensor in met:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        assert isinstance(tensor, FakeTensor)
    assert x.abs().sum() > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_fakes_of_ones_own_are_taken_as_they_are() -> None:
    with FakeTensorMode():
        module, x = nn.Linear(4, 3), torch.randn(4)
    assert estimate(module, x)["reverse"].result_bytes == 48


def test_a_setting_that_a_module_holds_is_read() -> None:
    flag = torch.tensor(3.0)
    assert estimate(lambda x: x * flag.item(), torch.ones(5))["looped"].peak_bytes is not None


# --- what can't be known ---


def depends_on_values(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    "func",
    [depends_on_values, lambda x: x[x > 0], lambda x: x * float(x[0]), lambda x: torch.unique(x)],
)
def test_a_function_that_depends_on_its_data_says_so(func: Callable[[Tensor], Tensor]) -> None:
    found = estimate(func, torch.ones(6), chunk_size=2)
    assert "can't be run on fakes: its course depends on the data" in found["reverse"].reason
    assert found.outputs is None
    assert found["looped"].peak_bytes is found["looped"].flops is found["looped"].sweeps is None
    assert "?" in repr(found)


def test_sizes_tell_what_they_can() -> None:
    def func(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(x.detach())) * x

    found = estimate(func, torch.ones(6), chunk_size=4)
    assert found.inputs == 6
    assert (found["forward"].sweeps, found["forward"].evaluations) == (2, 2)
    assert (found["reverse"].sweeps, found["reverse"].evaluations) == (None, 1)


def test_a_refusal_has_a_row_of_its_own() -> None:
    found = estimate(torch.cholesky_inverse, torch.eye(3))
    row = found["forward"]
    assert row.reason.startswith("refused: torch's forward mode of cholesky_inverse is wrong")
    assert row.peak_bytes is row.flops is row.evaluations is None
    assert found["reverse"].peak_bytes is not None


def test_what_no_strategy_takes() -> None:
    found = estimate(lambda x: x + 1j, torch.ones(2))
    assert all("outputs must be real" in row.reason for row in found)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="estimate: argnums must be positions"):
        estimate(torch.sin, torch.ones(2), argnums=3)
    with pytest.raises(ValueError, match="estimate: chunk_size must be at least 1"):
        estimate(torch.sin, torch.ones(2), chunk_size=0)
    with pytest.raises(TypeError, match="estimate: argument 0 must hold at least one floating"):
        estimate(torch.sin, torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="estimate: func must return tensors"):
        estimate(lambda x: "text", torch.ones(2))
    with pytest.raises(ValueError, match="estimate: it must be called outside of transforms"):
        torch.vmap(lambda x: estimate(torch.sin, x))(torch.ones(2))


# --- the table ---


@pytest.fixture
def found() -> Estimate:
    weight = torch.empty(3000, 1000, device="meta")
    return estimate(lambda x: torch.tanh(weight @ x), torch.empty(1000, device="meta"))


def test_the_table_is_aligned_and_for_people(found: Estimate) -> None:
    title, header, *rows = repr(found).split("\n")
    assert title == "Jacobian of 3000 outputs by 1000 inputs"
    assert [row.split()[0] for row in rows] == ["reverse", "forward", "looped"]
    end = header.index("result") + len("result")
    assert all(row[:end].endswith("11.4 MiB") for row in rows)
    assert "18 G" in rows[0]
    assert "3 of 3000 sweeps" in rows[2]


def test_seconds_are_told_where_the_device_is_of_this_machine() -> None:
    weight = torch.randn(300, 200)
    found = estimate(lambda x: torch.tanh(weight @ x), torch.randn(200))
    seconds = [row.seconds for row in found]
    assert all(s is not None and s > 0 for s in seconds)
    assert found["looped"].seconds > found["reverse"].seconds
    assert "time" in repr(found).split("\n")[1].split()
    assert found.to_dicts()[0]["seconds"] == seconds[0]
    meta = estimate(torch.tanh, torch.empty(3, device="meta"))
    assert [row.seconds for row in meta] == [None] * 3


def test_what_the_function_closes_over_is_not_swept() -> None:
    # a fake of the second weight came to lie where an intermediate result had been
    hidden, x = 64, torch.randn(16)
    first, second = torch.randn(hidden, 16), torch.randn(hidden, hidden)
    last = torch.randn(256, hidden)
    weights = [weight.numel() for weight in (first, second, last)]

    def func(x: Tensor) -> Tensor:
        return last @ torch.tanh(second @ torch.tanh(first @ x))

    with Recorder((x,)) as recorder:
        func(x)
    faked = CallForecast(Derivation("estimate", func), (x,), {})._costs
    assert faked is not None
    for found in (recorder.operations, faked.operations):
        assert max(each.read for each in found) == hidden * x.itemsize
    assert sum(each.flops for each in faked.operations) == 2 * sum(weights)


@pytest.mark.parametrize("is_chosen", [True, False])
def test_what_is_added_to_a_product_takes_no_work(is_chosen: bool) -> None:
    x, weight, bias = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
    with Recorder((weight, bias) if is_chosen else (bias,)) as recorder:
        F.linear(x, weight, bias)
        F.conv1d(x[None], weight[:, None, :2].expand(-1, 5, -1), bias)
    flops = [each.flops for each in recorder.operations if each.written]
    assert flops == ([2 * x.numel() * 4, 2 * (2 * 5 * 4 * 2)] if is_chosen else [0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_half_precision_are_multiplied_as_fast_as_in_float32(
    dtype: torch.dtype,
) -> None:
    x, weight = torch.ones(3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    operator = JacobianOperator(lambda w: ((F.linear(x, w),), ()), (weight,))
    costs = counted_costs(operator)
    assert costs is not None
    assert costs.of_products is machine(torch.device("cpu"), torch.float32)
    assert costs.speeds is machine(torch.device("cpu"), dtype)


def test_the_table_in_a_notebook(found: Estimate) -> None:
    page = found._repr_html_()
    assert page.count("<tr>") == 4
    assert "<caption>Jacobian of 3000 outputs by 1000 inputs</caption>" in page
    assert "can&#x27;t" in estimate(depends_on_values, torch.ones(1))._repr_html_()


def test_the_table_for_machines(found: Estimate) -> None:
    first, *_, last = found.to_dicts()
    assert first["strategy"] == "reverse"
    assert first["chunk_size"] is None
    assert last["chunk_size"] == 1
    assert last["result_bytes"] == 12_000_000
    assert len(found) == len(list(found)) == len(found.rows) == 3


def test_a_row_by_name(found: Estimate) -> None:
    assert found["forward"].strategy == jacfunc.Forward()
    with pytest.raises(KeyError, match="the rows 'reverse', 'forward', 'looped', got 'sparse'"):
        found["sparse"]


def test_aux_and_several_arguments() -> None:
    def func(a: Tensor, b: dict[str, Tensor]) -> tuple[Tensor, str]:
        return a * b["x"].sum(), "aux"

    args = (torch.ones(3), {"x": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)})
    found = estimate(func, *args, argnums=(0, 1), has_aux=True)
    assert (found.outputs, found.inputs) == (3, 5)
    assert [row.result_bytes for row in found] == [60] * 3
