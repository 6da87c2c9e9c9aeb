"""In forward mode a factor of a product that has no tangent is not multiplied by zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import jacfunc

MULTIPLIES = {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"}

Factors = Sequence[Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[[], Factors]]] = {
    "linear": (F.linear, lambda: (draw(5, 3), draw(4, 3), draw(4))),
    "linear of a vector": (F.linear, lambda: (draw(3), draw(4, 3), draw(4))),
    "linear of batches": (F.linear, lambda: (draw(2, 5, 3), draw(4, 3), draw(4))),
    "conv1d": (torch.conv1d, lambda: (draw(2, 3, 6), draw(4, 3, 2), draw(4))),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 1)),
        lambda: (draw(2, 3, 5, 4), draw(4, 3, 3, 2), draw(4)),
    ),
    "conv2d in groups": (
        lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 2),
        lambda: (draw(2, 4, 5, 4), draw(6, 2, 3, 3), draw(6)),
    ),
    "conv3d": (torch.conv3d, lambda: (draw(1, 2, 4, 4, 4), draw(3, 2, 2, 2, 2), draw(3))),
}
PUSHED = [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1), (0, 1, 2)]


def products_in(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key in MULTIPLIES)


def along(func: Callable[..., Tensor], factors: Factors, numbers: tuple[int, ...]) -> Callable:
    """The function of these factors alone."""

    def of_some(*some: Tensor) -> Tensor:
        every = list(factors)
        for number, factor in zip(numbers, some, strict=True):
            every[number] = factor
        return func(*every)

    return of_some


@pytest.mark.parametrize("numbers", PUSHED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_tangents_are_the_slope_along_them(name: str, numbers: tuple[int, ...]) -> None:
    func, make = PRODUCTS[name]
    factors = make()
    tangents = tuple(torch.randn_like(factors[n]) for n in numbers)
    point = tuple(factors[n] for n in numbers)
    of_some = along(func, factors, numbers)
    value, product = jacfunc.jvp(of_some, point, tangents)
    torch.testing.assert_close(value, func(*factors))
    # it is a polynomial of degree two along a line, of which a central difference is exact
    ahead, behind = (
        of_some(*(x + sign * v for x, v in zip(point, tangents, strict=True))) for sign in (1, -1)
    )
    torch.testing.assert_close(product, (ahead - behind) / 2)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("number", [0, 1])
def test_no_factor_is_multiplied_by_zeros(name: str, number: int) -> None:
    func, make = PRODUCTS[name]
    factors = make()
    of_one = along(func, factors, (number,))
    tangent = torch.randn_like(factors[number])

    def ours() -> object:
        return jacfunc.jvp(of_one, (factors[number],), (tangent,))

    ours()
    assert products_in(ours) == 2


class Net(torch.nn.Module):
    """Layers of which the activations are written in place."""

    def forward(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        hidden = F.linear(x, w)
        hidden.mul_(2)
        F.relu(hidden, inplace=True)
        return F.linear(hidden.tanh(), v).square().sum()


def test_second_derivatives_through_products_of_one_tangent() -> None:
    net, (x, w, v) = Net(), (draw(5, 3), draw(4, 3), draw(2, 4))
    leaves = [w.clone().requires_grad_(), v.clone().requires_grad_()]
    grads = torch.autograd.grad(net(x, *leaves), leaves, create_graph=True)
    tangents = torch.randn_like(w), torch.randn_like(v)
    expected = torch.autograd.grad(grads, leaves, tangents)

    def of_weights(w: Tensor, v: Tensor) -> Tensor:
        return net(x, w, v)

    for strategy in ("forward-over-reverse", "reverse-over-forward", "reverse-over-reverse"):
        blocks = jacfunc.hessian(of_weights, (0, 1), strategy=strategy)(w, v)
        for row, product in zip(blocks, expected, strict=True):
            parts = zip(row, tangents, strict=True)
            ours = sum(torch.tensordot(block, t, t.dim()) for block, t in parts)
            torch.testing.assert_close(ours, product)
    twice = jacfunc.jvp(lambda *p: jacfunc.jvp(of_weights, p, tangents)[1], (w, v), tangents)[1]
    inner = sum((product * t).sum() for product, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(twice, inner)


def test_inside_transforms_that_the_function_takes() -> None:
    x, w = draw(5, 3), draw(4, 3)
    functions: dict[Callable[[Tensor], Tensor], Tensor] = {
        lambda w: torch.vmap(lambda row: F.linear(row, w))(x): w,
        lambda x: torch.vmap(lambda row: F.linear(row, w))(x): x,
        lambda x: torch.vmap(lambda each: F.linear(x, each))(torch.stack([w, 2 * w])): x,
        lambda x: torch.func.jacfwd(lambda y: F.linear(y, w).sin().sum())(x): x,
        lambda w: torch.func.grad(lambda y: F.linear(y, w).sin().sum())(x): w,
    }
    for func, point in functions.items():
        expected = torch.autograd.functional.jacobian(func, point)
        torch.testing.assert_close(jacfunc.jacfwd(func)(point), expected)


def test_many_tangents_under_vmap_and_autocast() -> None:
    x, w = draw(5, 3), draw(4, 3)
    jacobian = jacfunc.jacfwd(lambda w: F.linear(x, w))(w)
    expected = torch.einsum("bi,oO->boOi", x, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(jacobian, expected)
    x, w, tangent = x.float(), w.float(), torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value, product = jacfunc.jvp(lambda w: F.linear(x, w), (w,), (tangent,))
        assert value.dtype == product.dtype == F.linear(x, w).dtype
    torch.testing.assert_close(product.float(), x @ tangent.T, rtol=0.02, atol=0.05)
