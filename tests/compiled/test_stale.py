"""What would make a trace stale is refused while tracing, or told apart at the call."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc import Compiled

X = torch.tensor([0.3, -0.5, 0.7])
SCALE = 2.0
TABLE = {"scale": 2.0}


def compiled(func: Callable[..., Any], derive: Any = jacfunc.jacrev) -> Compiled[Any, Any]:
    return jacfunc.compile(derive(func), backend="replay")


def check(jac: Compiled[Any, Any], scale: float, num_traces: int, x: Tensor = X) -> None:
    """The Jacobian of ``scale * sin`` comes back, after so many traces."""
    expected = torch.diag(scale * x.cos()).to(x.dtype)
    torch.testing.assert_close(jac(x), expected)
    torch.testing.assert_close(jac(x), expected)
    assert len(jac.compilations) == num_traces


# --- refused while tracing ---


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin()


def branch(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x.cos()


def appending(x: Tensor) -> Tensor:
    SEEN.append(x.shape)
    return x.sin()


SEEN: list[Any] = []
COUNT = itertools.count()
HIDDEN = torch.tensor([1.0, 2.0, 3.0])
READ = torch.tensor(2.0)


class Hiding:
    """Makes a tensor where nobody looks: in an installed library's cache, say."""

    def tensor(self) -> Tensor:
        return next(iter(self.__class__.__subclasses__())).held


class Holder(Hiding):
    held = torch.tensor(2.0)


HIDING = Hiding()
BUFFER = torch.zeros(3)
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "branch": (branch, "torch.where"),
    "item": (lambda x: x * x[0].item(), "torch.where"),
    "float": (lambda x: x * float(x.detach().sum()), "torch.where"),
    "tolist": (lambda x: x * x.detach().tolist()[0], "torch.where"),
    "numpy": (lambda x: x * float(x.detach().numpy()[0]), "torch.where"),
    "asarray": (lambda x: x * float(np.asarray(x.detach())[0]), "torch.where"),
    "a read of what it refers to": (lambda x: x * READ.item(), "torch.where"),
    "nonzero": (lambda x: x[x > 0].sin(), "selects by a mask"),
    "torch.rand": (lambda x: x * torch.rand(3), "draw no random numbers"),
    "dropout": (lambda x: nn.functional.dropout(x), "draw no random numbers"),
    "random": (lambda x: x * random.random(), "do the same at every call"),
    "NumPy's random": (lambda x: x * float(np.random.rand()), "do the same at every call"),
    "clock": (lambda x: x * time.perf_counter(), "do the same at every call"),
    "iterator": (lambda x: x * next(COUNT), "refer to tensors, modules, functions"),
    "counter": (Counting(), "change nothing that it refers to"),
    "list": (appending, "change nothing that it refers to"),
    "write into a tensor": (lambda x: (BUFFER.copy_(x.detach()), x.sin())[1], "write into"),
    "generator": (lambda x: x * next(iter(GENERATOR)), "refer to tensors"),
    "attribute of a cell": (lambda x: x * HIDING.tensor(), "have all tensors from"),
}
GENERATOR = (n for n in range(100))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    func, words = REFUSED[name]
    jac = compiled(func)
    with pytest.raises((ValueError, NotImplementedError), match=f"^compile: .*{words}"):
        jac(X.abs())
    assert jac.compilations == ()


def test_a_write_into_an_argument_is_refused() -> None:
    def func(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return x.sin() * y

    with pytest.raises(ValueError, match="write into no argument"):
        compiled(func)(X, torch.ones(3))


def test_running_statistics_are_refused() -> None:
    model = nn.BatchNorm1d(3)
    before = model.running_mean.clone()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="write into no argument"):
        jacfunc.compile(lambda x: model(x).sin(), backend="replay")(torch.randn(5, 3))
    model.running_mean = before


# --- told apart at the call ---


def test_a_closure_that_changed() -> None:
    scale = 2.0

    def func(x: Tensor) -> Tensor:
        return scale * x.sin()

    jac = compiled(func)
    check(jac, 2.0, 1)
    scale = 3.0
    check(jac, 3.0, 2)
    scale = 2.0
    check(jac, 2.0, 2)


def test_an_integer_is_not_the_number_that_it_equals() -> None:
    scale: float = 2

    def func(x: Tensor) -> Tensor:
        return (torch.ones(3, dtype=torch.int64) * scale).to(x.dtype) * x.sin()

    jac = compiled(func)
    check(jac, 2, 1)
    scale = 2.0
    check(jac, 2.0, 2)


def test_a_global_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    jac = compiled(lambda x: SCALE * x.sin())
    check(jac, 2.0, 1)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    check(jac, 5.0, 2)


def helper(x: Tensor) -> Tensor:
    return TABLE["scale"] * x.sin()


def test_a_global_of_a_function_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    jac = compiled(lambda x: helper(x))
    check(jac, 2.0, 1)
    monkeypatch.setitem(TABLE, "scale", 4.0)
    check(jac, 4.0, 2)
    monkeypatch.setitem(globals(), "helper", lambda x: 7 * x.sin())
    check(jac, 7.0, 3)


class Scaled:
    kind = 1.0

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.inner = SimpleNamespace(scales=[1.0, 1.0])

    @property
    def twice(self) -> float:
        return 2 * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.twice / 2 * self.kind * self.inner.scales[1] * x.sin()


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x.sin()


def test_attributes_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    func = Scaled(2.0)
    jac = compiled(func)
    check(jac, 2.0, 1)
    func.scale = 3.0
    check(jac, 3.0, 2)
    func.inner.scales[1] = 2.0
    check(jac, 6.0, 3)
    func.inner = SimpleNamespace(scales=[1.0, 1.0])
    check(jac, 3.0, 3)
    monkeypatch.setattr(Scaled, "kind", 5.0)
    check(jac, 15.0, 4)
    monkeypatch.setattr(Scaled, "__call__", lambda self, x: x.sin())
    check(jac, 1.0, 5)


def test_a_slot_that_changed() -> None:
    func = Slotted()
    jac = compiled(func)
    check(jac, 2.0, 1)
    func.scale = 3.0
    check(jac, 3.0, 2)


def test_an_attribute_beside_that_changed() -> None:
    def func(x: Tensor, power: float = 2.0) -> Tensor:
        return func.scale * power * x.sin()  # type: ignore[attr-defined, no-any-return]

    func.scale = 1.0  # type: ignore[attr-defined]
    jac = compiled(func)
    check(jac, 2.0, 1)
    func.scale = 2.0  # type: ignore[attr-defined]
    check(jac, 4.0, 2)
    func.__defaults__ = (3.0,)
    check(jac, 6.0, 3)


def test_an_array_that_was_written_into() -> None:
    scales = np.array([2.0, 2.0, 2.0], dtype=np.float32)
    for tensor in (torch.tensor, torch.from_numpy):
        scales[:] = 2.0
        jac = compiled(lambda x, tensor=tensor: tensor(scales) * x.sin())
        check(jac, 2.0, 1)
        scales[:] = 3.0
        check(jac, 3.0, 2)


def test_a_set_that_changed() -> None:
    names = {"sin"}
    jac = compiled(lambda x: (2.0 if "twice" in names else 1.0) * x.sin())
    check(jac, 1.0, 1)
    names.add("twice")
    check(jac, 2.0, 2)


def test_what_a_partial_holds() -> None:
    scales = [2.0]
    jac = compiled(partial(lambda scales, x: scales[0] * x.sin(), scales))
    check(jac, 2.0, 1)
    scales[0] = 3.0
    check(jac, 3.0, 2)


# --- numbers in tensors are inputs ---


def test_numbers_in_tensors_are_those_of_the_call() -> None:
    scale = torch.tensor(2.0)
    jac = compiled(lambda x: scale * x.sin())
    check(jac, 2.0, 1)
    scale.fill_(3.0)
    check(jac, 3.0, 1)
    scale.data = torch.tensor(4.0)
    check(jac, 4.0, 1)
    scale = torch.tensor(5.0)
    check(jac, 5.0, 1)
    scale = torch.tensor(5.0, dtype=torch.float64)
    check(jac, 5.0, 2)


def test_tensors_that_become_one() -> None:
    first, second = torch.tensor(2.0), torch.tensor(3.0)
    jac = compiled(lambda x: first / second * x.sin())
    check(jac, 2 / 3, 1)
    first = second
    check(jac, 1.0, 2)
    first = torch.tensor(6.0)
    check(jac, 2.0, 2)


def test_an_argument_that_is_also_referred_to() -> None:
    own = X.clone()
    jac = jacfunc.compile(jacfunc.jacrev(lambda x: own * x.sin()), backend="replay")
    for x in (own, X + 1):
        torch.testing.assert_close(jac(x), torch.diag(own * x.cos()))
    both = jacfunc.compile(jacfunc.jacrev(lambda x, y: y * x.sin()), backend="replay")
    for x, y in ((X, X), (X, X + 1)):
        torch.testing.assert_close(both(x, y), torch.diag(y * x.cos()))
    assert len(both.compilations) == 1


def test_a_module_in_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    jac = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="replay")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
        torch.testing.assert_close(jac(X), torch.func.jacrev(model)(X).detach())
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(jac(X), torch.func.jacrev(model)(X).detach())
    model[0].weight = nn.Parameter(torch.ones(4, 3))
    torch.testing.assert_close(jac(X), torch.func.jacrev(model)(X).detach())
    assert len(jac.compilations) == 1


MODEL_CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "mode": lambda model: model.eval(),
    "mode of a part": lambda model: model[1].eval(),
    "another part": lambda model: model.__setitem__(0, nn.Tanh()),
    "another setting": lambda model: setattr(model[0], "negative_slope", 0.5),
    "a hook": lambda model: model.register_forward_hook(lambda *_: _[-1] * 2),
    "a hook before": lambda model: model.register_forward_pre_hook(lambda m, args: args[0] * 2),
    "another forward": lambda model: setattr(model, "forward", lambda x: x.exp()),
    "another class": lambda model: setattr(model[2], "__class__", nn.Sigmoid),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_module_that_changed(name: str) -> None:
    model = nn.Sequential(nn.LeakyReLU(), nn.Dropout(0.0), nn.Tanh())
    jac = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="replay")
    jac(X)
    MODEL_CHANGES[name](model)
    torch.testing.assert_close(jac(X), torch.func.jacrev(model)(X.clone()).detach())
    assert len(jac.compilations) == 2


# --- other calls ---


def test_other_shapes_and_dtypes() -> None:
    jac = compiled(torch.sin)
    check(jac, 1.0, 1)
    check(jac, 1.0, 2, torch.ones(4))
    check(jac, 1.0, 3, X.double())
    check(jac, 1.0, 4, torch.ones(6)[::2])
    check(jac, 1.0, 5, X.clone().requires_grad_())
    check(jac, 1.0, 5)


def test_other_values_among_the_arguments() -> None:
    jac = jacfunc.compile(jacfunc.jacrev(lambda x, n, *, add: n * x.sin() + add), backend="replay")
    for n, traces in ((2, 1), (3, 2), (2.0, 3), (True, 4), (2, 4)):
        torch.testing.assert_close(jac(X, n, add=0.0), torch.diag(n * X.cos()))
        assert len(jac.compilations) == traces
    for zero in (0.0, -0.0):
        torch.testing.assert_close(jac(X, 2, add=zero), torch.diag(2 * X.cos()))
    assert len(jac.compilations) == 5


def settings() -> Iterator[Any]:
    yield torch.no_grad()
    yield torch.inference_mode()
    yield torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("number", range(3))
def test_other_settings_of_torch(number: int) -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    derive = jacfunc.jacrev(lambda x: weight @ x.sin())
    jac = jacfunc.compile(derive, backend="replay")
    jac(X)
    with [*settings()][number]:
        expected = derive(X)
        for _ in range(2):
            answer = jac(X)
            assert answer.dtype == expected.dtype
            assert answer.requires_grad == expected.requires_grad
            torch.testing.assert_close(answer, expected)
    assert len(jac.compilations) == 2
    assert jac(X).requires_grad


def test_another_default_dtype() -> None:
    jac = compiled(lambda x: torch.tensor([2.0, 2.0, 2.0]).sum() / 3 * x.double())
    try:
        jac(X)
        torch.set_default_dtype(torch.float64)
        jac(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(jac.compilations) == 2


def test_inside_transforms_it_is_the_derivative() -> None:
    jac = compiled(torch.sin)
    jac(X)
    torch.testing.assert_close(torch.func.vmap(jac)(X[:, None])[:, 0, 0], X.cos())
    torch.testing.assert_close(torch.func.grad(lambda x: jac(x).sum())(X), -X.sin())
    torch.testing.assert_close(torch.func.jvp(jac, (X,), (torch.ones(3),))[1], torch.diag(-X.sin()))
    torch.testing.assert_close(jacfunc.jacfwd(jac)(X).sum(1), torch.diag(-X.sin()))
    graph = torch.fx.experimental.proxy_tensor.make_fx(jac)(X)
    torch.testing.assert_close(graph(X + 1), torch.diag((X + 1).cos()))
    assert len(jac.compilations) == 1
