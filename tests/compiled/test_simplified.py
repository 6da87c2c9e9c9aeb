"""What traces leave out, and that numbers stay those of the function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import jacfunc
from jacfunc._torch import Graphs
from jacfunc._traces.passes import simplified

X = torch.tensor([0.3, -0.5, 0.7])


def test_forward_mode_multiplies_no_zeros() -> None:
    """Tangents of weights are zero; only what tangents and the first values need is left."""
    first, second = torch.randn(5, 3), torch.randn(4, 5)
    func = lambda x: second @ torch.tanh(first @ x)  # noqa: E731
    jac = jacfunc.compile(jacfunc.jacfwd(func), backend="replay")
    expected = second @ torch.diag(1 - torch.tanh(first @ X) ** 2) @ first
    torch.testing.assert_close(jac(X), expected)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.testing.assert_close(jac(X), expected)
    counts = Counter(event.name for event in seen.events())
    assert (counts["aten::mv"], counts["aten::mm"], counts["aten::copy"]) == (1, 1, 0)


@pytest.mark.parametrize(
    "zeros",
    [
        lambda x: torch.zeros(3, 3),
        lambda x: torch.zeros(()).expand(3, 3),
        lambda x: x.new_zeros(3, 3),
    ],
)
def test_zeros_of_a_user_are_multiplied(zeros: Callable[[Tensor], Tensor]) -> None:
    """Zero times infinity is no number, and must not become one."""
    func = lambda x: zeros(x) @ x + x.cos()  # noqa: E731
    for derive in (func, lambda x: jacfunc.jvp(func, (x,), (x.cos(),))):
        call = jacfunc.compile(derive, backend="replay")
        call(X)
        result = call(torch.full((3,), float("inf")))
        assert torch.stack([*result] if isinstance(result, tuple) else [result]).isnan().all()


def test_inductors_own_code() -> None:
    """The same tensor twice, numbers that are no floats, layouts, and results of one's own."""

    def func(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out = torch.tanh(w @ x)
        return out, out, out.argsort(), w.t() * 2, w.t(), x

    call = jacfunc.compile(func)
    w = torch.randn(4, 3)
    for factor in (1.0, 2.0, 3.0):
        x = factor * X
        results, expected = call(x, w), func(x, w)
        for result, other in zip(results, expected, strict=True):
            assert result.dtype == other.dtype
            torch.testing.assert_close(result, other)
        for result in results[2:]:
            result.zero_()


def test_no_tensor_stays_that_nothing_takes() -> None:
    """Inductor's wrapper would hand each to the code, at each call."""
    func = lambda x: torch.tensor(2.0) * x + torch.tensor([1.0, 2.0, 3.0])  # noqa: E731
    trace = Graphs.of(lambda x: (func(x),), (X,))
    assert [*trace.buffers()]
    graph, constants = simplified(trace, (X,))
    assert not [*graph.buffers()]
    torch.testing.assert_close(graph(X, *constants)[0], func(X))


SUMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "of rows": (lambda x: x.sum((0,), True).view(3, 4), 0),
    "of two dimensions": (lambda x: x.sum((0, -1), True).view(3), 0),
    "of all": (lambda x: x.sum((), True).view(1, 1), 1),
    "of another shape": (lambda x: x.sum((0,), True).view(4, 3), 1),
    "kept": (lambda x: x.sum((0,), True).view(1, 12), 1),
}
"""Functions of ``[2, 3, 4]``, and how many views of their sums are left."""


@pytest.mark.parametrize("name", SUMS)
def test_dimensions_that_a_sum_keeps_are_not_taken_away_after_it(name: str) -> None:
    """The gradient of a bias is such a sum, in each linear layer."""
    func, views = SUMS[name]
    x = torch.arange(24.0).view(2, 3, 4)
    call = jacfunc.compile(lambda x: func(2 * x), backend="replay")
    torch.testing.assert_close(call(x), func(2 * x))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = call(-x)
    torch.testing.assert_close(result, func(-2 * x))
    counts = Counter(event.name for event in seen.events() if event.cpu_parent is None)
    assert counts["aten::view"] + counts["aten::reshape"] == views


attend = torch.nn.functional.scaled_dot_product_attention


def heads(x: Tensor) -> Tensor:
    return x.view(1, 2, 3, -1)


DROPPING: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "attention": (
        lambda x: attend(x, x, x),
        lambda x: attend(x, x, x, dropout_p=0.5),
    ),
    "attention of heads": (
        lambda x: attend(heads(x), heads(x), heads(x)),
        lambda x: attend(heads(x), heads(x), heads(x), dropout_p=0.5),
    ),
    "dropout": (
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda x: torch.nn.functional.dropout(x, 0.5),
    ),
    "dropout of nothing": (
        lambda x: torch.nn.functional.dropout(x, 0.0),
        lambda x: torch.nn.functional.dropout(x, 0.1),
    ),
    "native dropout": (
        lambda x: torch.native_dropout(x, 0.5, False)[0],
        lambda x: torch.native_dropout(x, 0.5, True)[0],
    ),
    "leaky": (
        lambda x: torch.nn.functional.rrelu(x),
        lambda x: torch.nn.functional.rrelu(x, training=True),
    ),
}
"""Functions that are marked as drawing, with arguments with which they draw nothing, or do."""


@pytest.mark.parametrize("name", DROPPING)
def test_what_drops_nothing_draws_nothing(name: str) -> None:
    exact, drawing = DROPPING[name]
    x = torch.randn(2, 3, 4)
    call = jacfunc.compile(torch.func.grad(lambda x: exact(x).square().sum()), backend="replay")
    for factor in (1.0, -0.5):
        at = (factor * x).requires_grad_()
        (expected,) = torch.autograd.grad(exact(at).square().sum(), at)
        torch.testing.assert_close(call(factor * x), expected)
    with pytest.raises(ValueError, match="must draw no random numbers"):
        jacfunc.compile(drawing, backend="replay")(x)


def test_what_is_not_autocast_stays_so() -> None:
    weight = torch.eye(3) * (1 + 2**-12)

    def func(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return weight @ x

    call = jacfunc.compile(func, backend="replay")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            result = call(torch.ones(3, 3))  # which bfloat16 has no digits for
            assert torch.equal(result, torch.full((3, 3), 1 + 2**-12))


def test_copies_of_which_memory_is_read_are_made() -> None:
    """An address in a copy of a slice is another one than in what was sliced."""
    call = jacfunc.compile(lambda x: x.clone().as_strided((2,), (1,), 0) * 2, backend="replay")
    for _ in range(3):
        row = torch.randn(4)
        torch.testing.assert_close(call(row[1:]), row[1:3] * 2)
