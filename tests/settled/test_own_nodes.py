"""Backward passes of users' own that take no several rows at once: what is written down calls them.

The rows are compared with plain gradients, and what such a pass depends on changes from call to
call: numbers outside, what it writes into, what it returns, and the modes around.
"""

from __future__ import annotations

from collections.abc import Callable
from gc import collect
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.settled.test_sweeps import CLOSE, after_many, by_inputs, normal, num_sweeps

HIDDEN: dict[str, Any] = {"factor": 2.0, "way": "as ever", "calls": 0}


@pytest.fixture(autouse=True)
def hidden() -> None:
    HIDDEN.update(factor=2.0, way="as ever", calls=0)


class Sine(torch.autograd.Function):
    """Of factor · x, by NumPy; the way of its backward pass is said from outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = HIDDEN["factor"]
        return torch.from_numpy(np.sin(ctx.factor * x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        HIDDEN["calls"] += 1
        (x,), way = ctx.saved_tensors, HIDDEN["way"]
        slope = ctx.factor * np.cos(ctx.factor * x.numpy())
        if way == "writes by NumPy":
            numbers = grad.numpy()
            numbers *= slope
            return torch.from_numpy(numbers)
        if way == "writes":
            return grad.mul_(torch.from_numpy(slope))
        if way == "leaves out zeros" and not grad.numpy().any():
            return None
        if way == "raises":
            raise ArithmeticError("too large")
        if way == "writes into what it saved":
            x.mul_(1.0)
        if way == "draws":
            return torch.from_numpy(grad.numpy() * slope) * (1 + 0 * torch.rand(()))
        result = torch.from_numpy(grad.numpy() * slope)
        return result.float() if way == "another dtype" else result


class Two(torch.autograd.Function):
    """Two outputs of two tensors and a number; cotangents of what nobody uses are None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        a, b = x.detach().numpy(), y.detach().numpy()
        return torch.from_numpy(factor * a * b), torch.from_numpy(a + b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y = (each.numpy() for each in ctx.saved_tensors)
        product = None if grads[0] is None else ctx.factor * grads[0].numpy()
        total = 0 * x if grads[1] is None else grads[1].numpy()
        if product is None:
            return torch.from_numpy(1 * total), None, torch.from_numpy(1 * total)
        return torch.from_numpy(product * y + total), None, torch.from_numpy(product * x + total)


def both(x: Tensor) -> Tensor:
    product, total = Two.apply(x, 3.0, x.tanh())
    return product * total


class Between(nn.Module):
    """A step of a user's own: at the beginning, in the middle, beside what it gets, at the end."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 4), nn.Linear(4, 4), step

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(self.step(x))
        # torch itself gives a cotangent that one node writes into to the other, too
        h = self.step(h) if HIDDEN["way"].startswith("writes") else h + self.step(h)
        return self.step(self.last(h))


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "one tensor": Sine.apply,
    "two tensors": both,
    "one of two is used": lambda x: Two.apply(x, 3.0, x.tanh())[0],
    "the other is used": lambda x: Two.apply(x, 3.0, x.tanh())[1],
    "one leads nowhere": lambda x: Two.apply(x, 3.0, torch.ones_like(x))[0],
}


def written(step: Callable[[Tensor], Tensor] = Sine.apply) -> tuple[nn.Module, Any]:
    """A module, and the door by inputs of which sweeps are written down."""
    module = Between(step).double()
    door = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    jac = after_many(door, lambda: (normal(3)(5),))
    assert num_sweeps(lambda: jac(normal(3)(5))) == 0
    return module, jac


def assert_right(module: nn.Module, jac: Any) -> None:
    x = normal(3)(5)
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


@pytest.mark.parametrize("name", STEPS)
def test_rows_are_those_of_plain_gradients(name: str) -> None:
    module, jac = written(STEPS[name])
    for _ in range(3):
        assert_right(module, jac)
        for param in module.parameters():
            param.data.mul_(0.9)


def test_the_users_code_runs_once_a_row_in_every_call() -> None:
    _, jac = written()
    HIDDEN["calls"] = 0
    jac(normal(3)(5))
    assert HIDDEN["calls"] == 3 * 4


def test_what_it_depends_on_is_read_in_every_call() -> None:
    module, jac = written()
    for factor in (2.0, -1.5, 0.5):
        HIDDEN["factor"] = factor
        assert_right(module, jac)


WAYS = ("writes", "writes by NumPy", "leaves out zeros", "draws", "another dtype")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("from_the_start", [False, True])
def test_other_ways_of_it_are_right(way: str, from_the_start: bool) -> None:
    HIDDEN["way"] = way if from_the_start else "as ever"
    module = Between(Sine.apply).double()
    jac = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    after_many(jac, lambda: (normal(3)(5),))
    x, HIDDEN["way"] = normal(3)(5), way
    expected = by_inputs(module, x)
    rounding = {"rtol": 1e-6, "atol": 1e-6} if way == "another dtype" else CLOSE
    for _ in range(5):
        torch.testing.assert_close(jac(x), expected, **rounding)
    HIDDEN["way"] = "as ever"
    assert_right(module, jac)


def test_its_errors_are_told() -> None:
    module, jac = written()
    for _ in range(5):
        HIDDEN["way"] = "raises"
        with pytest.raises((ArithmeticError, NotImplementedError), match="too large"):
            jac(normal(3)(5))
    HIDDEN["way"] = "as ever"
    assert_right(module, jac)


def test_what_it_writes_into_what_was_saved_is_refused_as_by_torch() -> None:
    module, jac = written()
    HIDDEN["way"] = "writes into what it saved"
    for _ in range(5):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            jac(normal(3)(5))
    HIDDEN["way"] = "as ever"
    assert_right(module, jac)


def test_modes_around_are_as_ever() -> None:
    module, jac = written()
    x = normal(3)(5)
    expected = by_inputs(module, x)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(jac(x).clone(), expected, **CLOSE)
    with torch.autocast("cpu"):
        by_autocast = jac(x)
    with torch.autocast("cpu"):
        torch.testing.assert_close(by_autocast, by_inputs(module, x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(jac(x), expected, **CLOSE)


def test_a_hook_that_is_set_later_is_called() -> None:
    def step(h: Tensor) -> Tensor:
        out: Tensor = Sine.apply(h)
        if HIDDEN["way"] == "hooked":
            out.register_hook(lambda grad: 3 * grad)
        return out

    module, jac = written(step)
    HIDDEN["way"] = "hooked"
    assert_right(module, jac)


def test_another_function_in_its_place_is_called() -> None:
    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(3 * x.detach().numpy())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return torch.from_numpy(3 * grad.numpy())

    module, jac = written(lambda x: (Sine if HIDDEN["way"] == "as ever" else Tripled).apply(x))
    HIDDEN["way"] = "tripled"
    assert_right(module, jac)


def test_nodes_are_left_as_they_were_and_not_kept() -> None:
    class Seen(Sine):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            nodes.add(ctx)
            return Sine.backward(ctx, grad)

    nodes: WeakSet[Any] = WeakSet()
    _, jac = written(Seen.apply)
    jac(normal(3)(5))
    collect()
    assert not nodes
    x = normal(3)(5).requires_grad_()
    out = Seen.apply(x)
    rows = jacfunc.graph_jacobian(out, x, per_sample=True)
    slopes: Any = (2 * (2 * x).cos()).detach()
    torch.testing.assert_close(rows, slopes.diag_embed(), **CLOSE)
    assert "apply" not in vars(out.grad_fn)


def test_by_parameters_the_graph_is_swept() -> None:
    module = Between(Sine.apply).double()
    jac = after_many(jacfunc.module_jacobian(module, per_sample=True), lambda: (normal(3)(5),))
    assert num_sweeps(lambda: jac(normal(3)(5))) > 0
