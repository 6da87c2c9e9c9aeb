"""Columns that are written down: what they hold for, and the rows that are beside them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import jacfunc
from jacfunc._torch import autograd
from jacfunc._traces import FEWEST_CALLS
from jacfunc.strategies._rows import SettledColumns, SettledRows
from jacfunc.testing import known_machine
from tests.house.calls import is_own, num_calls
from tests.strategies.test_settled import looped_jacobian
from tests.strategies.test_written import (
    CALLS,
    CHANGES,
    W,
    X,
    check_changes,
    hooked,
    is_replayed,
    packed,
    written,
)

TALL = torch.linspace(-1, 1, 3 * 4096, dtype=torch.float64).view(4096, 3)
COLUMNS, ROWS = jacfunc.Forward().sweeps, jacfunc.Reverse().sweeps


@pytest.fixture(autouse=True)
def _same_plans() -> Iterator[None]:
    with known_machine():
        yield


def tall(x: Tensor) -> Tensor:
    return torch.tanh(TALL @ x)


def tall_jacobian(x: Tensor) -> Tensor:
    return (1 - tall(x) ** 2)[:, None] * TALL


@pytest.mark.parametrize("name", [name for name in CHANGES if "hook" not in name])
def test_what_changes_between_calls_is_seen(name: str) -> None:
    check_changes(name, "forward")


def test_hooks_are_refused_and_passed_by_as_in_first_calls() -> None:
    factor, offset = 1.0, 0
    derive = written(jacfunc.jacobian(lambda x: hooked(x, factor), strategy="forward"))
    packs = written(jacfunc.jacobian(lambda x: packed(x, offset), strategy="forward"))
    factor, offset = 3.0, 1
    for _ in range(5):
        with pytest.raises(RuntimeError, match="cannot register a hook"):
            derive(X)
        torch.testing.assert_close(packs(X), torch.diag(X.cos()))


def test_columns_that_auto_chooses_are_written_down() -> None:
    derive = jacfunc.jacobian(tall)
    assert type(jacfunc.plan(tall, X).strategy) is jacfunc.Forward
    written(derive)
    for step in range(3):
        torch.testing.assert_close(derive(X + step), tall_jacobian(X + step))
    assert num_calls(lambda: derive(X), is_own) < 54


def test_a_loop_over_columns_that_auto_chooses_is_written_down() -> None:
    curve = lambda x: torch.sin(TALL[:, 0] * x)  # noqa: E731
    derive, one = jacfunc.jacobian(curve), X[:1]
    assert jacfunc.plan(curve, one).strategy == jacfunc.Looped("columns")
    written(derive, one)
    expected = torch.cos(TALL[:, 0] * (one + 1)) * TALL[:, 0]
    torch.testing.assert_close(derive(one + 1), expected[:, None])


def test_of_rows_and_columns_the_faster_ones_are_written_down() -> None:
    torch.manual_seed(0)
    square = torch.randn(64, 64, dtype=torch.float64)
    f = lambda x: torch.tanh(square @ x)  # noqa: E731
    x = torch.randn(64, dtype=torch.float64)
    rows = SettledRows(f, 1, x.shape, False, False, (COLUMNS, ROWS))
    columns = SettledColumns(f, x.shape, "same", lambda x: rows.evaluated, (COLUMNS, ROWS))
    for settled in (rows, columns):
        for _ in range(FEWEST_CALLS):
            assert settled.at(x) is not None
        assert settled._written is not None
        known = settled.at(x + 1)
        assert known is not None
        torch.testing.assert_close(known[0], f(x + 1))
        torch.testing.assert_close(known[1], (1 - f(x + 1) ** 2)[:, None] * square)


def test_what_can_be_written_down_in_one_way_alone_is() -> None:
    rows = SettledRows(tall, 1, torch.Size([4096]), False, False, ())
    looped = jacfunc.Looped("rows").sweeps  # of too many rows
    columns = SettledColumns(tall, torch.Size([4096]), "same", lambda x: rows.evaluated, (looped,))
    both = SettledColumns(
        tall, torch.Size([4096]), "same", lambda x: rows.evaluated, (looped, COLUMNS)
    )
    for settled, is_written in ((columns, False), (both, True)):
        for _ in range(FEWEST_CALLS + 1):
            known = settled.at(X)
            assert known is not None
            torch.testing.assert_close(known[1], tall_jacobian(X))
        assert (settled._written is not None) == is_written


def root(x: Tensor) -> Tensor:
    return (x[0].sqrt() + x[1:].square().sum()).expand(2048) * 1.0


def test_a_nan_of_written_columns_is_refused_or_taken_by_rows() -> None:
    derive = written(jacfunc.jacobian(root, strategy="forward"))
    chooses = written(jacfunc.jacobian(root))
    zero = torch.zeros_like(X)
    infinite = torch.tensor([torch.inf, 0, 0], dtype=X.dtype).expand(2048, 3)
    for _ in range(5):
        with pytest.raises(NotImplementedError, match="nan"):
            derive(zero)
        torch.testing.assert_close(chooses(zero), infinite)
    expected = torch.stack([0.5 / X[0].abs().sqrt(), 2 * X[1], 2 * X[2]]).expand(2048, 3)
    for each in (derive, chooses):
        torch.testing.assert_close(each(X), expected)


def test_rows_that_are_written_down_give_no_nan_where_columns_give_none() -> None:
    f = lambda x: torch.cat([x.sqrt(), 2 * x, 3 * x])  # noqa: E731
    rows = SettledRows(f, 1, torch.Size([3]), False, False, ())
    columns = SettledColumns(f, torch.Size([3]), "same", lambda x: rows.evaluated, (ROWS,))
    one = X[:1]
    for _ in range(FEWEST_CALLS):
        columns.at(one)
    assert columns._written is not None
    known = columns.at(torch.zeros_like(one))  # a row of zeros meets an infinite derivative
    assert known is not None
    assert known[1].flatten().tolist() == [torch.inf, 2, 3]


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_columns_that_may_not_draw_the_same_are_pushed(randomness: Any) -> None:
    derive = jacfunc.jacfwd(torch.sin, randomness=randomness)
    for _ in range(CALLS):
        derive(X)
    assert not is_replayed(derive)


def test_writing_down_leaves_random_numbers_as_they_were() -> None:
    f = lambda x: torch.tanh(W @ x) * torch.rand(2, dtype=torch.float64)  # noqa: E731
    derive = jacfunc.jacobian(f, strategy="forward")
    for seed in range(CALLS):
        torch.manual_seed(seed)
        result = derive(X)
        torch.manual_seed(seed)
        torch.testing.assert_close(result, looped_jacobian(f, X))


def test_columns_within_a_budget_keep_no_graph() -> None:
    derive = jacfunc.jacobian(tall, memory=2**28)
    for _ in range(CALLS):
        torch.testing.assert_close(derive(X), tall_jacobian(X))
    assert not is_replayed(derive)


@pytest.mark.parametrize("strategy", ["forward", "auto"])
def test_what_requires_gradients_later_is_differentiated(strategy: str) -> None:
    c = TALL.clone()
    derive = written(jacfunc.jacobian(lambda x: torch.tanh(c @ x), strategy=strategy))
    c.requires_grad_()
    for _ in range(5):
        result = derive(X)
        assert result.requires_grad
    (gradient,) = torch.autograd.grad(result.sum(), c)
    values = tall(X)[:, None]
    expected = (1 - values**2) * (1 - 2 * values * X * TALL.sum(1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_code_of_a_user_in_a_backward_pass_is_never_written_down() -> None:
    class Sine(torch.autograd.Function):
        """A sine that can be taken in both modes, and has a wrong backward pass."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            return 5 * cotangents[0]

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            return tangents[0] * ctx.saved_tensors[0].cos()

    derive = jacfunc.jacobian(lambda x: Sine.apply(x) * 2, strategy="forward")
    for _ in range(CALLS):
        torch.testing.assert_close(derive(X), torch.diag(2 * X.cos()))


def test_errors_of_the_function_are_those_of_a_first_call() -> None:
    raises: Exception | None = None

    def f(x: Tensor) -> Tensor:
        if raises is not None:
            raise raises
        return tall(x)

    derive = written(jacfunc.jacobian(f, strategy="forward"))
    for raises in (ValueError("of the function"), RuntimeError("of the function")):
        with pytest.raises(type(raises), match="of the function"):
            derive(X)
    raises = None
    torch.testing.assert_close(derive(X), tall_jacobian(X))


def test_the_first_backward_pass_of_a_process_may_be_one_that_is_written_down() -> None:
    autograd._slow_dtypes.cache_clear()
    derive = written(jacfunc.jacobian(tall, strategy="forward"))
    torch.testing.assert_close(derive(X), tall_jacobian(X))


def test_columns_in_threads() -> None:
    derive = written(jacfunc.jacobian(tall, strategy="forward"))
    pushed = jacfunc.jacfwd(lambda x: torch.tanh(W @ x))

    def many(step: int) -> None:
        for number in range(20):
            at = X + step + number / 10
            torch.testing.assert_close(derive(at), tall_jacobian(at))
            expected = (1 - torch.tanh(W @ at) ** 2)[:, None] * W
            torch.testing.assert_close(pushed(at), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))


def test_where_columns_do_not_hold_numbers_are_drawn_as_by_a_plain_call() -> None:
    draws = False
    f = lambda x: x.sin() * (torch.rand(()) if draws else 2.0)  # noqa: E731
    derive = written(jacfunc.jacobian(f, strategy="forward"))
    draws = True
    for seed in range(5):
        torch.manual_seed(seed)
        jacobian, following = derive(X), torch.rand(())
        torch.manual_seed(seed)
        torch.testing.assert_close(jacobian, torch.diag(X.cos() * torch.rand(())))
        assert torch.equal(torch.rand(()), following)


def test_columns_that_seldom_hold_are_pushed_for_good() -> None:
    """Each miss evaluates twice, and so draws a way by Python's random numbers twice."""
    way, num_ways = "sine", 0

    def f(x: Tensor) -> Tensor:
        nonlocal num_ways
        num_ways += 1
        return x.sin() if way == "sine" else x.cos() * 3

    derive = written(jacfunc.jacobian(f, strategy="forward"))
    doubled = 0
    for way in ["cosine", "sine"] * 8:
        num_ways = 0
        slopes = X.cos() if way == "sine" else -3 * X.sin()
        torch.testing.assert_close(derive(X), torch.diag(slopes))
        doubled += num_ways - 1
    assert doubled == 3
