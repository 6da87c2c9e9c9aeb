"""What traces leave out, and that numbers stay those of the function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import jacfunc

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
