"""Laplacians that are written down: as right as at first, whatever changes from call to call."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc
from tests.house.calls import is_call, num_calls

CALLS = 20
"""After so many a kind of call is written down."""

Function = Callable[[Tensor], Tensor]


def net(*widths: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1], nn.Flatten(0)).double().requires_grad_(False)


def points(size: int = 4) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64)


def looped(func: Function, x: Tensor) -> Tensor:
    """The Laplacian of the sum of what a function returns, an input after the other."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(func(x).sum(), x, create_graph=True)
    total = torch.zeros((), dtype=x.dtype)
    for k in range(len(x)):
        if first.requires_grad:
            (column,) = torch.autograd.grad(first[k], x, retain_graph=True, allow_unused=True)
            total = total + (0 if column is None else column[k])
    return total


class Settled:
    """The Laplacian of a function, after calls that settle it: of a batch, and of a point."""

    def __init__(self, func: Function, calls: int = CALLS) -> None:
        self.func = func
        self.of_one = jacfunc.laplacian(func)
        self.of_batch = jacfunc.vmap(self.of_one)
        for _ in range(calls):
            self.check()

    def check(self) -> None:
        """Two calls are those of loops."""
        x = points()
        expected = torch.stack([looped(self.func, point) for point in x])
        found = self.of_batch(x)
        torch.testing.assert_close(found.reshape(4, -1).sum(1), expected, rtol=1e-10, atol=1e-10)
        one = self.of_one(x[0]).sum()
        torch.testing.assert_close(one, expected[0], rtol=1e-10, atol=1e-10)

    @property
    def is_settled(self) -> bool:
        """Does a call with a batch run but few functions?"""
        x = points()
        gc.disable()
        try:
            return num_calls(lambda: self.of_batch(x), is_own_rule) == 0
        finally:
            gc.enable()


def is_own_rule(frame: Any, event: str, argument: Any) -> bool:
    """Is a rule that carries derivatives called?"""
    name = frame.f_code.co_filename
    return event == "call" and "_forward_laplacian" in name and not name.endswith("jet.py")


def test_few_functions_are_called() -> None:
    """Counted: those of Python and C of a network of three layers, its own modules among them."""
    laplacian = jacfunc.vmap(jacfunc.laplacian(net(3, 8, 8, 8, 1)))
    x = points()
    for _ in range(2 * CALLS):
        laplacian(x)
    gc.disable()
    try:
        assert num_calls(lambda: laplacian(x), is_call) <= 240
    finally:
        gc.enable()


W, B = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

FUNCTIONS: dict[str, Function] = {
    "network": net(3, 8, 8, 1),
    "network of two outputs": net(3, 8, 2),
    "matrix in front": lambda x: torch.tanh(W @ x).sum(),
    "constants computed anew": lambda x: torch.sin(x @ W.T.exp() + B.square()).sum(),
    "numbers and options": lambda x: (2.5 * F.gelu(W @ x, approximate="tanh")).sum() ** 2,
    "containers": lambda x: torch.cat((x[:2] * x[1:], x[..., 1:].sin())).prod(),
    "shapes": lambda x: (x.reshape(x.shape[0], 1) / x.numel()).sin().mean(x.dim()),
    "distances": lambda x: (x - W).square().sum(-1).sqrt().sum(),
    "the same twice": lambda x: torch.addcmul(x, W[0], W[0]).exp().sum(),
    "norm": lambda x: x.norm() ** 3,
    "normalization": lambda x: F.layer_norm(W @ x, (4,), B, None).sigmoid().sum(),
    "attention": lambda x: F.scaled_dot_product_attention(
        (W * x)[None], (W + x)[None], (W - x)[None], dropout_p=0.0
    ).sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_stay_right(name: str) -> None:
    settled = Settled(FUNCTIONS[name])
    settled.check()
    assert settled.is_settled


@pytest.mark.parametrize("name", ["network", "matrix in front", "containers", "attention"])
def test_values_jacobians_and_diagonals(name: str) -> None:
    func = FUNCTIONS[name]
    parts = jacfunc.vmap(jacfunc.value_jacobian_laplacian(func))
    diagonal = jacfunc.vmap(jacfunc.hessian_diagonal(func))
    for _ in range(CALLS):
        x = points()
        hessians = torch.stack([torch.func.hessian(func)(point) for point in x]).reshape(4, 3, 3)
        jacobians = torch.stack([torch.func.jacrev(func)(point) for point in x])
        value, jacobian, laplacian = parts(x)
        torch.testing.assert_close(value, torch.stack([*map(func, x)]))
        torch.testing.assert_close(jacobian, jacobians)
        torch.testing.assert_close(laplacian.flatten(), hessians.diagonal(dim1=1, dim2=2).sum(-1))
        expected = hessians.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonal(x).reshape(4, 3), expected)


def test_results_may_be_written_into() -> None:
    laplacian = jacfunc.vmap(jacfunc.laplacian(lambda x: W @ x + x.square().sum()))
    for _ in range(2 * CALLS):
        result = laplacian(points())
        torch.testing.assert_close(result, torch.full((4, 4), 6.0, dtype=torch.float64))
        result.zero_()


def test_results_lie_apart() -> None:
    """Of the exponential the second derivative is the value."""
    parts = jacfunc.value_jacobian_laplacian(torch.exp)
    for _ in range(2 * CALLS):
        x = torch.randn(1, dtype=torch.float64)
        value, jacobian, laplacian = parts(x)
        value.zero_()
        torch.testing.assert_close(jacobian, x.exp()[None])
        jacobian.zero_()
        torch.testing.assert_close(laplacian, x.exp())


# --- what changes ---


def in_place(model: nn.Sequential) -> None:
    model[0].weight.mul_(1.5)


def by_data(model: nn.Sequential) -> None:
    model[0].weight.data.mul_(1.5)


def other_data(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data * 1.5


def other_strides(model: nn.Sequential) -> None:
    model[2].weight.data = model[2].weight.data.T.contiguous().T * 1.5


def replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight * 1.5, requires_grad=False)


def tied(model: nn.Sequential) -> None:
    model[4].weight = model[2].weight


def no_bias(model: nn.Sequential) -> None:
    model[2].bias = None


def other_layer(model: nn.Sequential) -> None:
    model[1] = nn.Sigmoid()


def longer(model: nn.Sequential) -> None:
    model.insert(3, nn.Tanh())


def shorter(model: nn.Sequential) -> None:
    del model[3]


def hooked(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = (
    *(in_place, by_data, other_data, other_strides, replaced, tied, no_bias, other_layer),
    *(longer, shorter, hooked),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changes(change: Callable[[nn.Sequential], None]) -> None:
    model = net(3, 6, 6, 6, 1)
    settled = Settled(model)
    assert settled.is_settled
    for _ in range(5):
        change(model)
        settled.check()


def test_weights_that_are_replaced_at_each_call_stay_settled() -> None:
    model = net(3, 6, 1)
    settled = Settled(model)
    for _ in range(5):
        model[0].weight = nn.Parameter(torch.randn(6, 3).double(), requires_grad=False)
        assert settled.is_settled
        settled.check()


class Switched(nn.Module):
    """A function with a number, a flag and tensors of its own, which may change."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.flag, self.seen = 2.0, False, torch.zeros(())
        self.first, self.second = W.clone(), W.clone()
        self.extra: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.first @ x) * self.factor
        self.seen = self.first.sum()
        if self.extra is not None:
            h = self.extra(self, h)
        return (h * (self.second @ x)).sum()


def number(switched: Switched) -> None:
    switched.factor = -0.0 if switched.factor == 0 else 0.0 if switched.factor == 3 else 3.0


def other_kind(switched: Switched) -> None:
    switched.factor = 3


def one_for_two(switched: Switched) -> None:
    switched.second = switched.first


def swapped(switched: Switched) -> None:
    switched.first, switched.second = switched.second * 2, switched.first


def detaches(switched: Switched) -> None:
    switched.extra = lambda self, h: h.detach()


def takes_gradients_off(switched: Switched) -> None:
    def extra(self: Switched, h: Tensor) -> Tensor:
        with torch.no_grad():
            return h * 1

    switched.extra = extra


def branches(switched: Switched) -> None:
    switched.extra = lambda self, h: h * 2 if h.sum() > 0 else h


def masks(switched: Switched) -> None:
    switched.extra = lambda self, h: torch.where(h > 0, h.square(), h)


def catches(switched: Switched) -> None:
    def extra(self: Switched, h: Tensor) -> Tensor:
        try:
            return h.cos()
        except Exception:
            return h

    switched.extra = extra


def no_torch(switched: Switched) -> None:
    switched.extra = lambda self, h: h * float(self.first.sum())


SWITCHES = (
    *(number, other_kind, one_for_two, swapped, detaches),
    *(takes_gradients_off, branches, masks, catches, no_torch),
)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_function_changes(switch: Callable[[Switched], None]) -> None:
    func = Switched()
    settled = Settled(func)
    assert settled.is_settled
    for _ in range(5):
        switch(func)
        settled.check()
        torch.testing.assert_close(func.seen, func.first.sum())


def test_what_is_noted_at_tensors_is_forgotten() -> None:
    factor = torch.tensor(2.0, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        if not hasattr(x, "factor"):
            x.factor = factor * 1
        return (x.square() * x.factor).sum()

    laplacian = jacfunc.laplacian(func)
    for _ in range(2 * CALLS):
        factor.add_(1)
        torch.testing.assert_close(laplacian(points()[0]), 6 * factor)


def test_what_is_remembered_by_tensors_is_not_remembered() -> None:
    factor = torch.tensor(2.0, dtype=torch.float64)

    @functools.lru_cache(maxsize=100)
    def remembered(x: Tensor) -> Tensor:
        return factor * 1

    laplacian = jacfunc.laplacian(lambda x: (x.square() * remembered(x)).sum())
    for _ in range(2 * CALLS):
        factor.add_(1)
        torch.testing.assert_close(laplacian(points()[0]), 6 * factor)


@pytest.mark.parametrize("switch", [detaches, branches, masks, no_torch])
def test_a_function_that_always_does_so(switch: Callable[[Switched], None]) -> None:
    func = Switched()
    switch(func)
    settled = Settled(func)
    func.first.mul_(2)
    settled.check()


@pytest.mark.parametrize("begin", [0, CALLS])
def test_constants_that_are_written_between_their_uses(begin: int) -> None:
    """Each use sees other numbers, be it from the first call on or later."""
    factor, w = 1.0, W.clone()

    def func(x: Tensor) -> Tensor:
        h = torch.sin(w.copy_(W) @ x if factor != 1 else w @ x)
        if factor != 1:
            w.mul_(factor)
        return (h * (w @ x)).sum()

    laplacian = jacfunc.vmap(jacfunc.laplacian(func))
    for call in range(CALLS + 5):
        factor = 2.0 if call >= begin else 1.0
        x, f = points(), factor
        expected = [looped(lambda x, f=f: (torch.sin(W @ x) * f * (W @ x)).sum(), p) for p in x]
        torch.testing.assert_close(laplacian(x), torch.stack(expected))
        w.copy_(W)


def test_a_list_that_is_changed_in_place() -> None:
    parts: list[Any] = [W[0], W[1]]
    settled = Settled(lambda x: torch.stack([x * part for part in parts]).sin().sum())
    dims = [0]
    other = Settled(lambda x: torch.sin(x.expand(3, 3).sum(dims)).sum())
    assert settled.is_settled
    assert other.is_settled
    parts.reverse()
    settled.check()
    parts.append(W[2])
    settled.check()
    dims[:] = [1]
    other.check()


def test_autocast_that_is_switched_on() -> None:
    model, inside = net(3, 6, 1).float(), False

    def func(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return model(x).float().sum()

    x = points().float()
    laplacian = jacfunc.vmap(jacfunc.laplacian(func))
    for _ in range(CALLS):
        exact = laplacian(x)
    for inside in (True, False, True):
        fresh = jacfunc.vmap(jacfunc.laplacian(func))(x)
        assert torch.equal(laplacian(x), fresh) or not inside
        torch.testing.assert_close(laplacian(x), fresh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(laplacian(x), jacfunc.vmap(jacfunc.laplacian(func))(x))
    torch.testing.assert_close(exact, jacfunc.vmap(jacfunc.laplacian(model))(x).flatten())


def test_noise_of_constants_is_drawn_anew() -> None:
    """Of a batch it is refused by vmap, of a point each call has its own."""
    is_noisy = False

    def func(x: Tensor) -> Tensor:
        scale = torch.randn(3, dtype=torch.float64) if is_noisy else W[0]
        return (scale * x.square()).sum()

    one = jacfunc.laplacian(func)
    batch = jacfunc.vmap(one, randomness="error")
    for _ in range(CALLS):
        one(points()[0])
        batch(points())
    is_noisy = True
    torch.manual_seed(1)
    expected = torch.stack([2 * torch.randn(3, dtype=torch.float64).sum() for _ in range(3)])
    torch.manual_seed(1)
    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([one(x) for _ in range(3)]), expected)
    with pytest.raises(RuntimeError, match="random"):
        batch(torch.ones(4, 3, dtype=torch.float64))


# --- where it is called ---


def test_other_kinds_of_points() -> None:
    settled = Settled(FUNCTIONS["norm"])
    for x in (points(7), points(1), points().T.contiguous().T, points()[::2], points().float()):
        expected = 12 * x.double().norm(dim=1)
        torch.testing.assert_close(settled.of_batch(x).double(), expected)
    assert settled.of_batch(points(0)).shape == (0,)


def test_where_rules_give_nan_it_is_swept() -> None:
    diagonal = jacfunc.hessian_diagonal(lambda x: x.sqrt().sum())
    x = torch.tensor([1.0, 4.0], dtype=torch.float64)
    for _ in range(CALLS):
        assert diagonal(x).tolist() == [-1 / 4, -1 / 32]
    x[0] = 0
    assert diagonal(x).tolist() == [-torch.inf, -1 / 32]


def test_weights_are_trained_through_it() -> None:
    model = net(3, 6, 6, 1)
    settled = Settled(model)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        x = points()
        loss = settled.of_batch(x).square().sum()
        weights = [p for name, p in model.named_parameters() if name != "4.bias"]
        trace = torch.vmap(lambda x: torch.func.hessian(model)(x)[0].trace())(x)
        expected = torch.autograd.grad(trace.square().sum(), weights)
        optimizer.zero_grad()
        loss.backward()
        for weight, grad in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, grad)
        optimizer.step()
        with torch.no_grad():
            settled.of_batch(x)
            for _ in range(CALLS):
                found = settled.of_batch(x)
        torch.testing.assert_close(found, settled.of_batch(x).detach())


def test_it_is_differentiated_and_mapped() -> None:
    func = FUNCTIONS["network"]
    settled = Settled(func)
    x = points()

    def trace(x: Tensor) -> Tensor:
        return torch.func.hessian(lambda x: func(x).sum())(x).trace()

    one = lambda x: settled.of_one(x).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(one)(x[0]), torch.func.grad(trace)(x[0]))
    torch.testing.assert_close(jacfunc.jacrev(one)(x[0]), torch.func.grad(trace)(x[0]))
    torch.testing.assert_close(torch.vmap(one)(x), torch.vmap(trace)(x))
    pushed = torch.func.jvp(one, (x[0],), (x[1],)), torch.func.jvp(trace, (x[0],), (x[1],))
    torch.testing.assert_close(*pushed)
    xs = x.requires_grad_()
    (grad,) = torch.autograd.grad(settled.of_batch(xs).sum(), xs)
    torch.testing.assert_close(grad, torch.vmap(torch.func.grad(trace))(x))


def test_threads_share_a_door() -> None:
    settled = Settled(FUNCTIONS["network"])
    batches = [points() for _ in range(64)]
    expected = [settled.of_batch(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for found, other in zip(pool.map(settled.of_batch, batches), expected, strict=True):
            torch.testing.assert_close(found, other)


def test_a_function_may_wait_for_a_thread_that_takes_it_too() -> None:
    inner = jacfunc.laplacian(lambda x: x.square().sum())
    found: list[Tensor] = []

    def func(x: Tensor) -> Tensor:
        other = torch.ones(3, dtype=torch.float64)
        thread = threading.Thread(target=lambda: found.append(inner(other)))
        thread.start()
        thread.join()
        return (x.sin() * found[-1]).sum()

    laplacian = jacfunc.laplacian(func)
    for _ in range(CALLS + 3):
        x = points()[0]
        torch.testing.assert_close(laplacian(x), -6 * x.sin().sum())


def test_a_wrapper_of_a_laplacian_is_not_taken_for_it() -> None:
    laplacian = jacfunc.laplacian(FUNCTIONS["norm"])
    twice = functools.wraps(laplacian)(lambda x: 2 * laplacian(x))
    mapped = jacfunc.vmap(twice)
    for _ in range(CALLS + 3):
        x = points()
        torch.testing.assert_close(mapped(x), 24 * x.norm(dim=1))


class Owner(nn.Module):
    """A network that keeps its own Laplacian."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net(3, 6, 1)
        self.laplacian = jacfunc.vmap(jacfunc.laplacian(self.forward))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_nothing_is_kept_alive() -> None:
    owner, x = Owner(), points()
    for _ in range(CALLS):
        owner.laplacian(x)
    dead = [weakref.ref(owner), weakref.ref(owner.layers[0].weight), weakref.ref(x)]
    del owner, x
    gc.collect()
    assert [reference() for reference in dead] == [None, None, None]
