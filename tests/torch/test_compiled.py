"""What torch.compile has compiled is differentiated as it was written, by every door."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.truth.oracles import assert_same, looped_hessian, looped_jacobian

D = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=D)
XS = torch.stack([X, -X, 2 * X, X.flip(0)])
TARGETS = torch.linspace(-1, 1, 8, dtype=D).reshape(4, 2)
COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


pytestmark = pytest.mark.usefixtures("fresh_compiler")
"""Compiled code is kept for the process: each test begins without any."""


def written(x: Tensor) -> Tensor:
    return torch.tanh(x) * x.sum()


JAC = looped_jacobian(written, (X,), 0)
HESSIAN = looped_hessian(written, (X,), 0)
DOORS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    **{
        strategy: (lambda f, s=strategy: jacfunc.jacobian(f, strategy=s)(X), JAC)
        for strategy in ("auto", "reverse", "forward", "looped")
    },
    "jacfwd": (lambda f: jacfunc.jacfwd(f)(X), JAC),
    "jacrev": (lambda f: jacfunc.jacrev(f)(X), JAC),
    "value": (lambda f: jacfunc.value_and_jacobian(f)(X), (written(X), JAC)),
    "hessian": (lambda f: jacfunc.hessian(f)(X), HESSIAN),
    "forward over reverse": (lambda f: jacfunc.hessian(f, strategy="forward")(X), HESSIAN),
    "jvp": (lambda f: jacfunc.jvp(f, (X,), (X,)), (written(X), JAC @ X)),
    "vjp": (lambda f: jacfunc.vjp(f, X)[1](X)[0], X @ JAC),
    "vmap": (lambda f: jacfunc.vmap(f)(XS), torch.stack([written(x) for x in XS])),
    "vmap of jacfwd": (
        lambda f: jacfunc.vmap(jacfunc.jacfwd(f))(XS),
        torch.stack([looped_jacobian(written, (x,), 0) for x in XS]),
    ),
    "plan": (lambda f: jacfunc.plan(f, X).strategy.materialize and None, None),
    "estimate": (lambda f: jacfunc.estimate(f, X) and None, None),
}


def as_method(backend: str) -> Any:
    class Holder:
        def method(self, x: Tensor) -> Tensor:
            return written(x)

    return torch.compile(Holder().method, backend=backend)


def inside_another(backend: str) -> Any:
    compiled = torch.compile(written, backend=backend)
    return lambda x: compiled(x) + 0 * x


FORMS = {
    "function": lambda backend: torch.compile(written, backend=backend),
    "method": as_method,
    "inside": inside_another,
}


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        *((form, "eager") for form in FORMS),
        ("function", "aot_eager"),
        pytest.param("function", "inductor", marks=COMPILER),
    ],
)
def test_functions(form: str, backend: str) -> None:
    func = FORMS[form](backend)
    for _ in range(2):  # what one door leaves behind must not change the next one's answer
        for name, (door, want) in [*DOORS.items(), *reversed(DOORS.items())]:
            assert_same({name: door(func)}, {name: want})
    assert_same(func(X), written(X))
    for door, want in DOORS.values():  # and after it was compiled for plain tensors
        assert_same(door(func), want)


# --- modules ---


class Net(nn.Module):
    def __init__(self, layer: Any = lambda layer: layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = layer(nn.Linear(3, 4).double()), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class Compiled(Net):
    forward = torch.compile(Net.forward, backend="eager")


def in_place() -> nn.Module:
    net = Net()
    net.compile(backend="eager")
    return net


MODULES = {
    "module": lambda: torch.compile(Net(), backend="eager"),
    "in place": in_place,
    "submodule": lambda: Net(lambda layer: torch.compile(layer, backend="eager")),
    "forward": Compiled,
}
LOSS = nn.MSELoss(reduction="sum")
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda m: jacfunc.module_jacobian(m, flat=True)(XS),
    "looped": lambda m: jacfunc.module_jacobian(m, flat=True, strategy="looped")(XS),
    "samples": lambda m: jacfunc.module_jacobian(m, per_sample=True, flat=True)(XS),
    "forward": lambda m: jacfunc.module_jacobian(m, per_sample=True, flat=True, strategy="forward")(
        XS
    ),
    "structured": lambda m: jacfunc.module_jacobian(
        m, per_sample=True, flat=True, strategy="structured"
    )(XS),
    "inputs": lambda m: jacfunc.module_jacobian(m, "inputs", per_sample=True)(XS),
    "stream": lambda m: torch.cat([b.flatten() for b in _blocks(jacfunc.stream_jacobian(m)(XS))]),
    "ntk": lambda m: jacfunc.ntk(m, None, XS),
    "diagonal": lambda m: list(jacfunc.ggn(m, LOSS)(XS, TARGETS).diagonal().values()),
    "matrix": lambda m: jacfunc.ggn(m, LOSS)(XS, TARGETS).matrix(),
    "compiled loss": lambda m: jacfunc.ggn(m, torch.compile(LOSS, backend="eager"))(
        XS, TARGETS
    ).matrix(),
    "product": lambda m: list(
        (jacfunc.ggn(m, LOSS)(XS, TARGETS) @ dict(m.named_parameters())).values()
    ),
    "norms": lambda m: jacfunc.gradient_norms(m, LOSS)(XS, TARGETS),
    "projection": lambda m: jacfunc.random_projection(m, 8)(XS),
    "function": lambda m: jacfunc.jacrev(m)(XS),
}


def _blocks(stream: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for block in stream:
        found += [x for x in (block if isinstance(block, tuple) else (block,)) if _is(x)]
    return found


def _is(x: object) -> bool:
    return isinstance(x, Tensor)


@pytest.mark.parametrize("made", MODULES.values(), ids=MODULES)
def test_modules(made: Any) -> None:
    want = {name: ask(Net()) for name, ask in QUESTIONS.items()}
    module = made()
    with torch.no_grad():
        module(XS)
    for name, ask in QUESTIONS.items():
        assert_same({name: ask(module)}, {name: want[name]})
    assert_same(module(XS), Net()(XS))


@pytest.mark.parametrize("made", MODULES.values(), ids=MODULES)
def test_names_are_those_of_named_parameters(made: Any) -> None:
    module = made()
    names = [name for name, _ in module.named_parameters()]
    assert list(jacfunc.module_jacobian(module)(XS)) == names
    assert list(jacfunc.param_slices(module)) == names
    found = jacfunc.ggn(module, LOSS)(XS, TARGETS)
    assert list(found.diagonal()) == list(found.blocks()) == names


def test_a_compiled_part_inside_a_checkpoint() -> None:
    """The part runs again in the backward pass."""
    compiled = torch.compile(written, backend="eager")
    for strategy in ("reverse", "looped", "auto"):
        func = jacfunc.jacobian(
            lambda x: checkpoint(compiled, x, use_reentrant=False), strategy=strategy
        )
        assert_same(func(X), JAC)


# --- the compiler is left as it was ---


def test_the_compiler_compiles_outside_and_is_not_asked_inside() -> None:
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    func = torch.compile(written, backend=backend)
    for door in (jacfunc.jacrev, jacfunc.jacfwd, jacfunc.hessian):
        door(func)(X)
    assert calls == []
    func(X)
    assert calls == ["compiled"]


def test_other_threads_go_on_compiling() -> None:
    calls: list[str] = []
    inside, done = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(threading.current_thread().name)
        return graph.forward

    def waiting(x: Tensor) -> Tensor:
        inside.set()
        assert done.wait(30)
        return x**2

    worker = threading.Thread(target=lambda: jacfunc.jacrev(waiting)(X))
    torch.compile(written, backend="eager")  # loads the compiler
    worker.start()
    assert inside.wait(30)
    try:
        torch.compile(written, backend=backend)(X)
    finally:
        done.set()
        worker.join()
    assert calls == [threading.current_thread().name]


def test_stances_that_are_set_around_a_call_or_inside_it_are_kept() -> None:
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    def func(x: Tensor) -> Tensor:
        with torch.compiler.set_stance("default"):
            return x**2

    compiled = torch.compile(written, backend=backend)
    with torch.compiler.set_stance("force_eager"):
        assert_same(jacfunc.jacrev(func)(X), torch.diag(2 * X))
        compiled(X)
    assert calls == []
    compiled(X)
    assert calls == ["compiled"]


def test_a_jacobian_inside_compiled_code() -> None:
    inner = torch.compile(written, backend="eager")
    outer = torch.compile(lambda x: jacfunc.jacrev(inner)(x) * 2, backend="eager")
    assert_same(outer(X), 2 * JAC)
    assert_same(jacfunc.jacrev(inner)(X), JAC)
