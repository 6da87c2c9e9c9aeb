"""Later calls of a kind do less than the first ones, and all that differs is taken anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc.strategies import evaluate
from jacfunc.testing import known_machine
from tests.house.calls import is_own, num_calls

CALLS = 6  # until plans stay
X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
W = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=torch.float64)
B = torch.cat([W, -W, 2 * W])


def beside_the_value(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    both = jacfunc.value_and_jacobian(f)
    return lambda x: both(x)[1]


DOORS: dict[str, Any] = {
    "jacrev": jacfunc.jacrev,
    "auto": jacfunc.jacobian,
    "beside the value": beside_the_value,
}


@pytest.fixture(autouse=True)
def _same_plans() -> Iterator[None]:
    with known_machine():
        yield


def served(derive: Callable[[Tensor], Any], x: Tensor = X) -> bool:
    """Is a call one that has nothing to settle, and takes the short way to its end?"""

    def is_start(frame: Any, event: str, _: Any) -> bool:
        return event == "call" and frame.f_code is evaluate.__code__

    return not num_calls(lambda: derive(x), is_start)


def settled(derive: Callable[[Tensor], Any], x: Tensor = X) -> Callable[[Tensor], Any]:
    """The derivative, after so many calls that all is settled that can be."""
    for _ in range(CALLS):
        derive(x)
    return derive


def looped_jacobian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Rows by plain autograd, one after the other."""
    point = at.detach().clone().requires_grad_()
    out = f(point.clone())
    if not out.requires_grad:
        return out.new_zeros(out.shape + at.shape)
    rows = [torch.autograd.grad(number, point, retain_graph=True)[0] for number in out.flatten()]
    return torch.stack(rows).view(out.shape + at.shape)


def own_calls(run: Callable[[], object]) -> int:
    """How many of jacfunc's functions a call enters."""
    return num_calls(run, is_own)


@pytest.mark.parametrize("name", ["jacrev", "auto"])
def test_a_settled_call_does_half(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.tanh(W @ x)

    derive = DOORS[name](f)
    settled(derive)
    later = own_calls(lambda: derive(X))
    anew = own_calls(lambda: derive(X.clone().requires_grad_()))  # which is never settled
    assert later < 0.6 * anew
    assert later < 75


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.tanh(W @ x),
        lambda x: (W @ x).square().sum(),
        lambda x: x.sum(),
        lambda x: x,
        lambda x: x[None].expand(4, 3).cos(),
        lambda x: x.mul_(2).sin_(),
        lambda x: W.clone(),
    ],
    ids=["rows", "square", "sum", "identity", "matrix", "writes", "constant"],
)
def test_settled_calls_are_exact(door: Any, f: Any) -> None:
    derive = settled(door(f))
    for step in range(3):
        at = X + step
        torch.testing.assert_close(derive(at), looped_jacobian(f, at))
        assert at.equal(X + step)


def test_the_value_is_that_of_the_call() -> None:
    both = jacfunc.value_and_jacobian(lambda x: torch.tanh(W @ x))
    settled(both)
    assert served(both)
    value, jacobian = both(X + 1)
    torch.testing.assert_close(value, torch.tanh(W @ (X + 1)))
    torch.testing.assert_close(jacobian, (1 - value**2)[:, None] * W)
    assert not value.requires_grad
    assert not jacobian.requires_grad


def test_the_function_is_evaluated_once() -> None:
    count = 0

    def f(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return W @ x

    derive = settled(jacfunc.jacrev(f))
    count = 0
    assert served(derive)
    assert count == 1


class Kept(torch.autograd.Function):
    """A sum whose backward pass returns a tensor that is the user's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor) -> Tensor:
        ctx.own = own
        return (x * own).sum()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return ctx.own, None


def test_results_are_tensors_of_their_own() -> None:
    own = W[0].clone()
    derive = settled(jacfunc.jacrev(lambda x: Kept.apply(x, own)))
    derive(X).zero_()
    assert own.equal(W[0])


def test_another_kind_is_another_call() -> None:
    derive = settled(jacfunc.jacrev(torch.sin))
    for x in (X[:2], X.float(), X[:, None]):
        torch.testing.assert_close(derive(x), looped_jacobian(torch.sin, x))
        assert not served(jacfunc.jacrev(torch.sin), x)
    assert served(derive)


def test_what_others_look_at_is_taken_anew() -> None:
    derive = settled(jacfunc.jacrev(torch.sin))
    expected = torch.diag(X.cos())
    torch.testing.assert_close(torch.vmap(derive)(X[None])[0], expected)
    tangent = torch.func.jvp(derive, (X,), (X,))[1]
    torch.testing.assert_close(tangent, torch.diag(-X.sin() * X))
    derive(at := X.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(at.grad, -X.sin())
    assert not served(torch.vmap(derive), X[None])
    assert not served(derive, at)
    with torch.no_grad():
        torch.testing.assert_close(settled(derive)(X), expected)
        assert served(derive)
    with torch.inference_mode():
        torch.testing.assert_close(derive(X), expected)
        assert not served(derive)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_what_it_closes_over_may_require_gradients_later(grad_mode: bool) -> None:
    weight = W.clone()
    derive = settled(jacfunc.jacrev(lambda x: torch.tanh(weight @ x)))
    weight.requires_grad_()
    with torch.set_grad_enabled(grad_mode):
        for _ in range(CALLS):
            assert derive(X).requires_grad is grad_mode
    if grad_mode:
        (grad,) = torch.autograd.grad(derive(X).sum(), weight)
        jacobian = lambda w: ((1 - torch.tanh(w @ X) ** 2)[:, None] * w).sum()  # noqa: E731
        torch.testing.assert_close(grad, looped_jacobian(jacobian, W))


def test_another_output_is_taken_anew() -> None:
    mode = "vector"

    def f(x: Tensor) -> Any:
        returned = {
            "vector": lambda: W @ x,
            "scalar": lambda: x.sum(),
            "single": lambda: (W @ x).float(),
            "dict": lambda: {"a": W @ x},
            "twice": lambda: torch.stack([W @ x, W @ x]),
        }
        return returned[mode]()

    derive = settled(jacfunc.jacrev(f))
    for name, expected in (
        ("scalar", torch.ones_like(X)),
        ("dict", {"a": W}),
        ("vector", W),
        ("twice", torch.stack([W, W])),
        ("vector", W),
    ):
        mode = name
        torch.testing.assert_close(derive(X), expected)
    mode = "single"
    assert derive(X).dtype == jacfunc.jacrev(f)(X).dtype


def test_errors_are_those_of_a_first_call() -> None:
    fails, count = False, 0

    def f(x: Tensor) -> Any:
        nonlocal count
        if fails:
            count += 1
            raise ValueError("of the function")
        return x.sin()

    derive = settled(jacfunc.jacrev(f))
    fails = True
    with pytest.raises(ValueError, match="of the function"):
        derive(X)
    assert count == 1
    fails = False
    assert derive(X).equal(torch.diag(X.cos()))


class Failing(torch.autograd.Function):
    """A sine whose backward pass fails from some call on."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        if Failing.fails:
            raise ValueError("of the backward pass")
        return cotangents[0] * ctx.saved_tensors[0].cos()


def test_errors_of_backward_passes_are_refusals_as_in_a_first_call() -> None:
    derive = settled(jacfunc.jacrev(lambda x: Failing.apply(x)))
    Failing.fails = True
    messages = []
    for each in (derive, jacfunc.jacrev(lambda x: Failing.apply(x))):
        with pytest.raises(NotImplementedError, match="of the backward pass") as raised:
            each(X)
        messages.append(str(raised.value))
    Failing.fails = False
    assert messages[0] == messages[1]
    assert derive(X).equal(torch.diag(X.cos()))


def test_a_network_in_a_function() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net.requires_grad_(False)
    f = lambda x: net(x)  # noqa: E731
    derive = settled(jacfunc.jacrev(f))
    net[0].weight.mul_(2)
    torch.testing.assert_close(derive(X), looped_jacobian(f, X))
    assert served(derive)


def test_what_is_heard_is_said(caplog: pytest.LogCaptureFixture) -> None:
    derive = settled(jacfunc.jacobian(lambda x: torch.tanh(W @ x)))
    with caplog.at_level("INFO", "jacfunc"):
        derive(X)
        assert not served(derive)
    assert "Reverse" in caplog.text


def looped_hessian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Second derivatives by plain autograd, row by row."""
    return looped_jacobian(lambda x: _gradient(f, x), at).view(f(at.clone()).shape + at.shape * 2)


def _gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    point = x if x.requires_grad else x.clone().requires_grad_()
    out = f(point.clone())
    return torch.autograd.grad(out.sum(), point, create_graph=True)[0]


@pytest.mark.parametrize("strategy", ["auto", "reverse-over-reverse"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: (W @ x).square().sum(),
        lambda x: torch.tanh(W @ x).prod(),
        lambda x: torch.tanh(W @ x).prod()[None, None],
        lambda x: x.mul_(2).sin_().sum(),
        lambda x: x.square().sum(),
    ],
    ids=["square", "product", "of one number", "writes", "diagonal"],
)
def test_settled_hessians_are_exact(f: Any, strategy: str) -> None:
    derive = settled(jacfunc.hessian(f, strategy=strategy))
    assert served(derive)
    for step in range(3):
        at = X + step
        torch.testing.assert_close(derive(at), looped_hessian(f, at))
        assert at.equal(X + step)
        assert not derive(at).requires_grad


def test_settled_hessians_of_what_has_none_are_zero() -> None:
    for f in (lambda x: x.sum(), lambda x: W.sum()):
        derive = settled(jacfunc.hessian(f))
        assert derive(X).equal(torch.zeros(3, 3, dtype=torch.float64))


def test_a_settled_hessian_does_half() -> None:
    derive = settled(jacfunc.hessian(lambda x: torch.tanh(W @ x).prod()))
    later = own_calls(lambda: derive(X))
    anew = own_calls(lambda: derive(X.clone().requires_grad_()))  # which is never settled
    assert later < 0.5 * anew
    assert later < 110


def test_a_gradient_is_pulled_back_without_a_batch() -> None:
    derive = settled(jacfunc.jacrev(lambda x: (W @ x).square().sum()))
    assert served(derive)
    assert own_calls(lambda: derive(X)) < 52


@pytest.mark.parametrize("grad_mode", [True, False])
def test_what_a_hessian_closes_over_may_require_gradients_later(grad_mode: bool) -> None:
    weight = W.clone()
    derive = settled(jacfunc.hessian(lambda x: torch.tanh(weight @ x).sum()))
    expected = derive(X)
    weight.requires_grad_()
    with torch.set_grad_enabled(grad_mode):
        for _ in range(CALLS):
            assert derive(X).requires_grad is grad_mode
            torch.testing.assert_close(derive(X).detach(), expected)


def test_other_outputs_and_rows_of_hessians_are_taken_anew() -> None:
    mode = "number"

    def f(x: Tensor) -> Any:
        returned = {"number": lambda: x.prod(), "two": lambda: torch.stack([x.prod(), x[0] ** 2])}
        return returned[mode]()

    every, some = settled(jacfunc.hessian(f)), settled(jacfunc.hessian(f, rows=[1]))
    expected = looped_hessian(f, X)
    torch.testing.assert_close(some(X), expected[[1]])
    assert served(every)
    assert not served(some)
    mode = "two"
    assert every(X).shape == (2, 3, 3)
    torch.testing.assert_close(every(X)[0], expected)
    mode = "number"
    torch.testing.assert_close(every(X), expected)


class OnceAlone(torch.autograd.Function):
    """A square whose backward pass must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0] * ctx.saved_tensors[0]


def test_what_has_no_second_derivative_is_refused_later_too() -> None:
    by_formula = True

    def f(x: Tensor) -> Tensor:
        square: Tensor = x.square() if by_formula else OnceAlone.apply(x)
        return square.sum()

    derive = settled(jacfunc.hessian(f, strategy="reverse-over-reverse"))
    by_formula = False
    for _ in range(CALLS):
        with pytest.raises(NotImplementedError, match="once_differentiable"):
            derive(X)


def test_rows_one_by_one_are_settled_too() -> None:
    for f in (lambda x: torch.tanh(W @ x), lambda x: x[None].expand(4, 3).cos(), lambda x: W * 1):
        derive = settled(jacfunc.jacobian(f, strategy="looped"))
        assert served(derive)
        for step in range(3):
            torch.testing.assert_close(derive(X + step), looped_jacobian(f, X + step))


def test_another_row_takes_few_calls() -> None:
    few = settled(jacfunc.jacobian(lambda x: torch.tanh(B[:2] @ x), strategy="looped"))
    more = settled(jacfunc.jacobian(lambda x: torch.tanh(B @ x), strategy="looped"))
    assert own_calls(lambda: more(X)) - own_calls(lambda: few(X)) <= 4 * 11


def test_a_wide_network_of_few_outputs_is_swept_row_by_row() -> None:
    """Torch multiplies a large transposed matrix by few columns more slowly than one by one."""
    wide = torch.randn(512, 512)
    f = lambda x: torch.tanh(wide @ torch.tanh(wide @ x))[:4]  # noqa: E731
    x = torch.randn(512)
    assert jacfunc.plan(f, x).strategy == jacfunc.Looped()
    assert jacfunc.plan(lambda x: f(x).repeat(8), x).strategy == jacfunc.Reverse()
    assert jacfunc.plan(lambda x: torch.tanh(W.float() @ x[:3]), x).strategy == jacfunc.Reverse()
    derive = settled(jacfunc.jacobian(f), x)
    assert served(derive, x)
    torch.testing.assert_close(derive(x), looped_jacobian(f, x))


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("door", [jacfunc.jacfwd, jacfunc.jacobian], ids=["jacfwd", "auto"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.tanh(B @ x).repeat(9),
        lambda x: torch.outer(torch.tanh(B @ x), x).repeat(2, 3),
        lambda x: x.mul_(2).sin_(),
        lambda x: x,
        lambda x: B.sum(1),
        lambda x: torch.cat([x[None].expand(40, 3), (B @ x).expand(3, 6).mT]),
        lambda x: F.conv1d(x[None, None], B[:, None], padding=2).cos()[0],
        lambda x: F.linear(x, B).sin(),
    ],
    ids=["long", "matrix", "writes", "itself", "constant", "expanded", "padded", "product"],
)
def test_settled_columns_are_exact(door: Any, f: Any, grad_mode: bool) -> None:
    with torch.set_grad_enabled(grad_mode):
        derive = settled(door(f))
        for step in range(3):
            at = X + step
            result = derive(at)
            with torch.enable_grad():
                torch.testing.assert_close(result, looped_jacobian(f, at))
            assert not result.requires_grad
            assert at.equal(X + step)


def test_columns_at_once_are_settled() -> None:
    wide = torch.randn(4096, 3, dtype=torch.float64)
    f = lambda x: torch.tanh(wide @ x)  # noqa: E731
    for derive in (jacfunc.jacfwd(f), jacfunc.jacobian(f), beside_the_value(f)):
        settled(derive)
        torch.testing.assert_close(derive(X), (1 - f(X) ** 2)[:, None] * wide)
    assert type(jacfunc.plan(f, X).strategy) is jacfunc.Forward
    assert not served(settled(jacfunc.jacfwd(f, chunk_size=2)))
    derive = settled(jacfunc.jacobian(f))
    assert served(derive)
    later = own_calls(lambda: derive(X))
    anew = own_calls(lambda: derive(X.clone().requires_grad_()))  # which is never settled
    assert later < 0.5 * anew
    assert later < 60


def test_padding_by_name_needs_no_watch_but_a_product_does() -> None:
    """Forward mode multiplies two factors faster under its watch, if it gets these alone."""
    image = torch.randn(5, 5)
    kernel = torch.randn(2, 1, 3, 3)
    by_name = settled(jacfunc.jacfwd(lambda x: F.conv2d(x[None, None], kernel, padding=1)), image)
    assert served(by_name, image)
    bare = settled(jacfunc.jacfwd(lambda x: F.conv2d(x[None, None], kernel)), image)
    assert not served(bare, image)


def test_a_nan_of_columns_is_refused_later_too() -> None:
    f = lambda x: (x[0].sqrt() + x[1:].square().sum()).expand(2048)  # noqa: E731
    derive, chooses = settled(jacfunc.jacfwd(f)), settled(jacfunc.jacobian(f))
    assert served(derive)
    assert served(chooses)
    zero = torch.zeros_like(X)
    with pytest.raises(NotImplementedError, match="nan"):
        derive(zero)
    infinite = torch.tensor([torch.inf, 0, 0], dtype=X.dtype).expand(2048, 3)
    torch.testing.assert_close(chooses(zero), infinite)
    expected = torch.stack([0.5 / X[0].sqrt(), 2 * X[1], 2 * X[2]]).expand(2048, 3)
    torch.testing.assert_close(derive(X), expected)
    torch.testing.assert_close(chooses(X), expected)


def test_columns_of_what_requires_gradients_later_are_differentiable() -> None:
    weight = W.clone()
    derive = settled(jacfunc.jacfwd(lambda x: torch.tanh(weight @ x)))
    assert served(derive)
    weight.requires_grad_()
    for _ in range(CALLS):
        jacobian = derive(X)
        assert jacobian.requires_grad
    (grad,) = torch.autograd.grad(jacobian.sum(), weight)
    expected = lambda w: ((1 - torch.tanh(w @ X) ** 2)[:, None] * w).sum()  # noqa: E731
    torch.testing.assert_close(grad, looped_jacobian(expected, W))
    with torch.no_grad():
        for _ in range(CALLS):
            assert not derive(X).requires_grad


def test_other_outputs_of_columns_are_taken_anew() -> None:
    mode = "vector"

    def f(x: Tensor) -> Any:
        returned = {
            "vector": lambda: B @ x,
            "scalar": lambda: x.sum(),
            "dict": lambda: {"a": W @ x},
            "twice": lambda: torch.stack([W @ x, W @ x]),
            "branch": lambda: B @ x if x.sum() > 0 else W @ x,
        }
        return returned[mode]()

    derive = settled(jacfunc.jacfwd(f))
    for name, expected in (
        ("scalar", torch.ones_like(X)),
        ("dict", {"a": W}),
        ("vector", B),
        ("twice", torch.stack([W, W])),
        ("branch", B),
        ("vector", B),
    ):
        mode = name
        torch.testing.assert_close(derive(X), expected)
    random = settled(jacfunc.jacfwd(lambda x: (B @ x) * (torch.rand(6) if mode == "random" else 1)))
    assert served(random)
    mode = "random"
    with pytest.raises(NotImplementedError, match="random"):
        random(X)


def test_columns_inside_other_transforms_are_taken_anew() -> None:
    derive = settled(jacfunc.jacfwd(torch.sin))
    expected = torch.diag(X.cos())
    assert served(derive)
    torch.testing.assert_close(torch.vmap(derive)(X[None])[0], expected)
    tangent = torch.func.jvp(derive, (X,), (X,))[1]
    torch.testing.assert_close(tangent, torch.diag(-X.sin() * X))
    derive(at := X.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(at.grad, -X.sin())


def test_errors_under_columns_are_those_of_a_first_call() -> None:
    fails = False

    def f(x: Tensor) -> Any:
        if fails:
            raise ValueError("of the function")
        return x.sin()

    derive = settled(jacfunc.jacfwd(f))
    fails = True
    with pytest.raises(ValueError, match="of the function"):
        derive(X)
    fails = False
    assert derive(X).equal(torch.diag(X.cos()))


def test_settled_columns_in_two_threads() -> None:
    """Torch has one level of forward mode for all threads."""
    functions = (lambda x: (B @ x).sin(), lambda x: (W @ x).exp().repeat(4))
    doors = [settled(jacfunc.jacfwd(f)) for f in functions]
    expected = [looped_jacobian(f, X) for f in functions]

    def repeated(number: int) -> bool:
        return all(torch.allclose(doors[number](X), expected[number]) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeated, (0, 1)))
