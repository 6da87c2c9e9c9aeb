"""Changes that are hard to see: a number becomes three where it was two, in many places."""

from __future__ import annotations

import contextvars
import datetime
import enum
import functools
import os
import sys
import threading
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import jacfunc
from jacfunc import Compiled

X = torch.tensor([0.3, -0.5, 0.7])
Func = Callable[[Tensor], Tensor]
Change = Callable[[], Any]
MAKERS: dict[str, Callable[[], tuple[Func, Change]]] = {}


def case(make: Callable[[], tuple[Func, Change]]) -> Any:
    """A function that multiplies by two, and what makes that a three."""
    MAKERS[make.__name__.replace("_", " ")] = make
    return make


def compiled(func: Func) -> Compiled[Any, Any]:
    return jacfunc.compile(jacfunc.jacrev(func), backend="replay")


def check(jac: Compiled[Any, Any], scale: float, x: Tensor = X) -> None:
    torch.testing.assert_close(jac(x), torch.diag(scale * x.cos()))


class Held:
    scale = 2.0

    def by_scale(self, x: Tensor) -> Tensor:
        return self.scale * x.sin()


@case
def bound_method() -> tuple[Func, Change]:
    held = Held()
    return held.by_scale, lambda: setattr(held, "scale", 3.0)


@case
def bound_method_of_a_dict() -> tuple[Func, Change]:
    get = (table := {"scale": 2.0}).get
    return lambda x: get("scale", 0.0) * x.sin(), lambda: table.update(scale=3.0)


@case
def bound_method_of_a_list() -> tuple[Func, Change]:
    get = (scales := [2.0]).__getitem__
    return lambda x: get(0) * x.sin(), lambda: scales.__setitem__(0, 3.0)


@case
def method_that_a_class_binds() -> tuple[Func, Change]:
    class Function(torch.autograd.Function):
        scale = 2.0

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return Function.scale * cotangent * x.cos()

    return Function.apply, lambda: setattr(Function, "scale", 3.0)


@case
def private_slot() -> tuple[Func, Change]:
    class Slotted:
        __slots__ = ("__scale",)

        def __init__(self) -> None:
            self.put(2.0)

        def put(self, scale: float) -> None:
            self.__scale = scale

        def __call__(self, x: Tensor) -> Tensor:
            return self.__scale * x.sin()

    func = Slotted()
    return func, lambda: func.put(3.0)


@case
def only_slot() -> tuple[Func, Change]:
    class Slotted:
        __slots__ = "scale"

        def __call__(self, x: Tensor) -> Tensor:
            return self.scale * x.sin()  # type: ignore[no-any-return]

    func = Slotted()
    func.scale = 2.0
    return func, lambda: setattr(func, "scale", 3.0)


@case
def name_with_underscores() -> tuple[Func, Change]:
    class Named:
        __scale__ = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return self.__scale__ * x.sin()

    return Named(), lambda: setattr(Named, "__scale__", 3.0)


@case
def class_of_a_class() -> tuple[Func, Change]:
    class Meta(type):
        scale = 2.0

    class Made(metaclass=Meta):
        def __call__(self, x: Tensor) -> Tensor:
            return type(self).scale * x.sin()

    return Made(), lambda: setattr(Meta, "scale", 3.0)


@case
def base_class() -> tuple[Func, Change]:
    class Two:
        scale = 2.0

    class Three:
        scale = 3.0

    class Derived(Two):
        def __call__(self, x: Tensor) -> Tensor:
            return self.scale * x.sin()

    return Derived(), lambda: setattr(Derived, "__bases__", (Three,))


@case
def class_of_a_container() -> tuple[Func, Change]:
    class Things(tuple):  # type: ignore[type-arg]
        scale = 2.0

    things = Things((1.0,))
    return lambda x: things.scale * things[0] * x.sin(), lambda: setattr(Things, "scale", 3.0)


@case
def reference() -> tuple[Func, Change]:
    ref = weakref.ref(held := Held())
    return lambda x: ref().scale * x.sin(), lambda: setattr(held, "scale", 3.0)  # type: ignore[union-attr]


@case
def table_of_references() -> tuple[Func, Change]:
    table = weakref.WeakValueDictionary(held=(held := Held()))
    return lambda x: table["held"].scale * x.sin(), lambda: setattr(held, "scale", 3.0)


@case
def proxy_of_an_object() -> tuple[Func, Change]:
    proxy = weakref.proxy(held := Held())
    return lambda x: proxy.scale * x.sin(), lambda: setattr(held, "scale", 3.0)


@case
def kind_of_float() -> tuple[Func, Change]:
    class Scale(float):
        pass

    held = SimpleNamespace(scale=Scale(2.0))
    return lambda x: held.scale * x.sin(), lambda: setattr(held, "scale", Scale(3.0))


@case
def kind_of_text() -> tuple[Func, Change]:
    class Scale(str):
        pass

    held = SimpleNamespace(scale=Scale("2"))
    return lambda x: float(held.scale) * x.sin(), lambda: setattr(held, "scale", Scale("3"))


@case
def number_of_numpy() -> tuple[Func, Change]:
    scales = [np.float64(2.0)]
    return lambda x: float(scales[0]) * x.sin(), lambda: scales.__setitem__(0, np.float64(3.0))


@case
def sign_of_a_zero() -> tuple[Func, Change]:
    zeros = [np.float32(-0.0)]
    return (
        lambda x: (2.5 + 0.5 * float(np.copysign(1, zeros[0]))) * x.sin(),
        lambda: zeros.__setitem__(0, np.float32(0.0)),
    )


@case
def kind_of_array() -> tuple[Func, Change]:
    class Array(np.ndarray):
        pass

    scales = np.array([2.0]).view(Array)
    return lambda x: float(scales[0]) * x.sin(), lambda: scales.__setitem__(0, 3.0)


@case
def array_with_a_mask() -> tuple[Func, Change]:
    scales = np.ma.masked_array([2.0, 3.0], mask=[False, True])
    return lambda x: float(scales.max()) * x.sin(), lambda: scales.__setitem__(1, 3.0)


@case
def array_of_days() -> tuple[Func, Change]:
    days = np.array(["1970-01-03"], dtype="datetime64[D]")
    return (
        lambda x: float(days.astype(int)[0]) * x.sin(),
        lambda: days.__setitem__(0, np.datetime64("1970-01-04")),
    )


@case
def view_of_memory() -> tuple[Func, Change]:
    view = memoryview(memory := bytearray(b"\x02"))
    return lambda x: view[0] * x.sin(), lambda: memory.__setitem__(0, 3)


@case
def slice_of_a_list() -> tuple[Func, Change]:
    held = SimpleNamespace(piece=slice(1, 2))
    return lambda x: [1, 2, 3][held.piece][0] * x.sin(), lambda: setattr(held, "piece", slice(2, 3))


@case
def error() -> tuple[Func, Change]:
    held = SimpleNamespace(error=ValueError(2.0))
    return lambda x: held.error.args[0] * x.sin(), lambda: setattr(held, "error", ValueError(3.0))


@case
def variable_of_a_thread() -> tuple[Func, Change]:
    local = threading.local()
    local.scale = 2.0
    return lambda x: local.scale * x.sin(), lambda: setattr(local, "scale", 3.0)


@case
def variable_of_a_context() -> tuple[Func, Change]:
    variable = contextvars.ContextVar("variable", default=2.0)
    return lambda x: variable.get() * x.sin(), lambda: variable.set(3.0)


@case
def environment() -> tuple[Func, Change]:
    os.environ["JACFUNC_TEST_SCALE"] = "2"
    return (
        lambda x: float(os.environ["JACFUNC_TEST_SCALE"]) * x.sin(),
        lambda: os.environ.update(JACFUNC_TEST_SCALE="3"),
    )


@case
def variable_of_the_environment() -> tuple[Func, Change]:
    os.environ["JACFUNC_TEST_SCALE"] = "2"
    return (
        lambda x: float(os.getenv("JACFUNC_TEST_SCALE", "0")) * x.sin(),
        lambda: os.environ.update(JACFUNC_TEST_SCALE="3"),
    )


OWN: Any = types.ModuleType("module_of_a_test")
sys.modules["module_of_a_test"] = OWN


@case
def attribute_by_text() -> tuple[Func, Change]:
    OWN.scale = 2.0
    return lambda x: getattr(OWN, "scale") * x.sin(), lambda: setattr(OWN, "scale", 3.0)  # noqa: B009


@case
def attribute_by_a_variable() -> tuple[Func, Change]:
    OWN.scale, name = 2.0, "scale"
    return lambda x: getattr(OWN, name) * x.sin(), lambda: setattr(OWN, name, 3.0)


@case
def module_in_a_closure() -> tuple[Func, Change]:
    module: Any = types.ModuleType("module_in_a_closure")
    module.scale = 2.0
    return lambda x: module.scale * x.sin(), lambda: setattr(module, "scale", 3.0)


@case
def module_in_an_attribute() -> tuple[Func, Change]:
    module: Any = types.ModuleType("module_in_an_attribute")
    module.scale = 2.0
    held = SimpleNamespace(module=module)
    return lambda x: held.module.scale * x.sin(), lambda: setattr(module, "scale", 3.0)


@case
def module_that_is_imported_inside() -> tuple[Func, Change]:
    OWN.scale = 2.0

    def func(x: Tensor) -> Tensor:
        from module_of_a_test import scale  # type: ignore[import-not-found]

        return scale * x.sin()  # type: ignore[no-any-return]

    return func, lambda: setattr(OWN, "scale", 3.0)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.sin()


@case
def hook_of_all_modules() -> tuple[Func, Change]:
    register = nn.modules.module.register_module_forward_hook
    return Doubling(), lambda: HANDLES.append(register(lambda m, args, out: 1.5 * out))


HANDLES: list[Any] = []


@pytest.fixture(autouse=True)
def _without_hooks() -> Iterator[None]:
    yield
    while HANDLES:
        HANDLES.pop().remove()


class Kind(enum.Enum):
    ONE = 1


@case
def attribute_of_an_enum() -> tuple[Func, Change]:
    Kind.ONE.scale = 2.0  # type: ignore[attr-defined]
    return (
        lambda x: Kind.ONE.scale * x.sin(),  # type: ignore[attr-defined]
        lambda: setattr(Kind.ONE, "scale", 3.0),
    )


@case
def enum_of_another_class() -> tuple[Func, Change]:
    kinds = [enum.Enum("Kinds", {"A": scale}) for scale in (2.0, 3.0)]
    held = SimpleNamespace(kind=kinds[0]["A"])
    return lambda x: held.kind.value * x.sin(), lambda: setattr(held, "kind", kinds[1]["A"])


@case
def derivative_inside() -> tuple[Func, Change]:
    held = SimpleNamespace(scale=2.0)
    inner = jacfunc.vmap(jacfunc.jacrev(lambda x: -held.scale * x.cos()))
    return lambda x: inner(x), lambda: setattr(held, "scale", 3.0)


@case
def property_kept() -> tuple[Func, Change]:
    class Keeping:
        scale = 2.0

        @functools.cached_property
        def kept(self) -> float:
            return self.scale

        def __call__(self, x: Tensor) -> Tensor:
            return self.kept * x.sin()

    func = Keeping()
    return func, lambda: vars(func).update(kept=3.0)


@case
def function_with_a_cache() -> tuple[Func, Change]:
    scales = [2.0]
    cached = functools.cache(lambda: scales[0])
    return (
        lambda x: cached() * x.sin(),
        lambda: (scales.__setitem__(0, 3.0), cached.cache_clear()),
    )


@case
def dispatch_by_class() -> tuple[Func, Change]:
    @functools.singledispatch
    def func(x: Tensor) -> Tensor:
        return 2 * x.sin()

    return lambda x: func(x), lambda: func.register(Tensor, lambda x: 3 * x.sin())


@case
def default_of_a_table() -> tuple[Func, Change]:
    table: dict[str, float] = defaultdict(lambda: 2.0)
    return lambda x: table["scale"] * x.sin(), lambda: table.update(scale=3.0)


@case
def tables_in_a_row() -> tuple[Func, Change]:
    table = {"scale": 2.0}
    chain, counts = ChainMap({}, table), Counter(one=1)
    return lambda x: chain["scale"] * counts["one"] * x.sin(), lambda: table.update(scale=3.0)


@case
def order_in_a_table() -> tuple[Func, Change]:
    table = OrderedDict(two=2.0, three=3.0)
    return lambda x: next(iter(table.values())) * x.sin(), lambda: table.move_to_end("two")


@case
def names_in_a_tuple() -> tuple[Func, Change]:
    pair = namedtuple("pair", ["scale", "other"])
    pairs = [pair(2.0, 0.0)]
    return lambda x: pairs[0].scale * x.sin(), lambda: pairs.__setitem__(0, pair(3.0, 0.0))


@dataclass(frozen=True, slots=True)
class Frozen:
    scale: float


@case
def frozen_dataclass() -> tuple[Func, Change]:
    held = SimpleNamespace(settings=Frozen(2.0))
    return lambda x: held.settings.scale * x.sin(), lambda: setattr(held, "settings", Frozen(3.0))


@case
def method_with_arguments() -> tuple[Func, Change]:
    class Partly:
        def scaled(self, scale: float, x: Tensor) -> Tensor:
            return scale * x.sin()

        __call__ = functools.partialmethod(scaled, 2.0)

    return Partly(), lambda: setattr(
        Partly, "__call__", functools.partialmethod(Partly.scaled, 3.0)
    )


@case
def wrapper() -> tuple[Func, Change]:
    table = {"scale": 2.0}

    @functools.wraps(torch.sin)
    def func(x: Tensor) -> Tensor:
        return table["scale"] * x.sin()

    return func, lambda: table.update(scale=3.0)


@case
def attribute_of_a_tensor() -> tuple[Func, Change]:
    weight: Any = torch.ones(3)
    weight.scale = 2.0
    return lambda x: weight.scale * weight * x.sin(), lambda: setattr(weight, "scale", 3.0)


@case
def conjugation() -> tuple[Func, Change]:
    numbers = [torch.full((3,), 2.5 - 0.5j)]
    return (
        lambda x: (numbers[0].real + numbers[0].imag) * x.sin(),
        lambda: numbers.__setitem__(0, numbers[0].conj()),
    )


def put_into_torch(name: str, func: Func) -> None:
    """Put a function in the place of torch's own, until the test ends."""
    own = getattr(F, name)
    HANDLES.append(SimpleNamespace(remove=lambda: setattr(F, name, own)))
    setattr(F, name, func)


@case
def function_of_torch_that_is_replaced() -> tuple[Func, Change]:
    put_into_torch("silu", lambda x: 2 * x.sin())
    return lambda x: F.silu(x), lambda: put_into_torch("silu", lambda x: 3 * x.sin())


@case
def what_a_replaced_function_refers_to() -> tuple[Func, Change]:
    held = Held()
    put_into_torch("silu", lambda x: held.scale * x.sin())
    return lambda x: F.silu(x), lambda: setattr(held, "scale", 3.0)


@case
def code_of_a_function() -> tuple[Func, Change]:
    def helper(x: Tensor) -> Tensor:
        return 2 * x.sin()

    def other(x: Tensor) -> Tensor:
        return 3 * x.sin()

    return lambda x: helper(x), lambda: setattr(helper, "__code__", other.__code__)


@case
def forward_of_a_class() -> tuple[Func, Change]:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x.sin()

    return Own(), lambda: setattr(Own, "forward", lambda self, x: 3 * x.sin())


@case
def how_attributes_are_looked_up() -> tuple[Func, Change]:
    class Own:
        scale = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return self.scale * x.sin()

    def three(self: Any, name: str) -> Any:
        return 3.0 if name == "scale" else object.__getattribute__(self, name)

    return Own(), lambda: setattr(Own, "__getattribute__", three)


@case
def attributes_that_are_replaced() -> tuple[Func, Change]:
    held = Held()
    return lambda x: held.scale * x.sin(), lambda: setattr(held, "__dict__", {"scale": 3.0})


@case
def size_of_a_buffer() -> tuple[Func, Change]:
    buffer = torch.full((1,), 2.0)
    return lambda x: buffer.sum() * x.sin(), lambda: buffer.resize_(3).fill_(1.0)


@case
def memory_of_a_buffer() -> tuple[Func, Change]:
    buffer, other = torch.full((1,), 2.0), torch.full((6,), 0.5)
    return lambda x: buffer.sum() * x.sin(), lambda: buffer.set_(other)  # type: ignore[call-overload]


@case
def tensors_that_were_one() -> tuple[Func, Change]:
    held = SimpleNamespace(one=(scale := torch.tensor(2.0)), other=scale)
    return (
        lambda x: held.one * held.other / 2 * x.sin(),
        lambda: setattr(held, "other", torch.tensor(3.0)),
    )


@case
def parameter_that_is_taken_away() -> tuple[Func, Change]:
    model = nn.Module()
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    return (
        lambda x: (3 if model.scale is None else model.scale) * x.sin(),
        lambda: setattr(model, "scale", None),
    )


class OneAndAHalf(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


@case
def parametrization() -> tuple[Func, Change]:
    model = nn.Module()
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    return (
        lambda x: model.scale * x.sin(),
        lambda: parametrize.register_parametrization(model, "scale", OneAndAHalf()),
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_change_is_seen(name: str) -> None:
    func, change = MAKERS[name]()
    jac = compiled(func)
    check(jac, 2)
    check(jac, 2)
    assert len(jac.compilations) == 1
    change()
    check(jac, 3)
    check(jac, 3)


# --- settings of torch ---

SETTINGS: dict[str, tuple[Callable[[], bool], Callable[[bool], Any]]] = {
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "threads": (
        lambda: torch.get_num_threads() == 2,
        lambda on: torch.set_num_threads(1 + on),
    ),
    "type of autocast": (
        lambda: torch.get_autocast_dtype("cpu") == torch.float16,
        lambda on: torch.set_autocast_dtype("cpu", torch.float16 if on else torch.bfloat16),
    ),
    "default type": (
        lambda: torch.get_default_dtype() == torch.float64,
        lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
    ),
    "gradients": (lambda: not torch.is_grad_enabled(), lambda on: torch.set_grad_enabled(not on)),
    "autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    "device": (
        lambda: torch.empty(0).device.type == "meta",
        lambda on: torch.set_default_device("meta" if on else None),
    ),
    "precision": (
        lambda: torch.get_float32_matmul_precision() == "high",
        lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_torch_is_seen(name: str) -> None:
    is_on, switch = SETTINGS[name]
    # outside of the derivative, which switches gradients on
    jac = jacfunc.compile(
        lambda x: (3 if is_on() else 2) * jacfunc.jacrev(torch.sin)(x), backend="replay"
    )
    check(jac, 2)
    try:
        switch(True)
        answers = [jac(X) for _ in range(2)]
    finally:
        switch(False)
    for answer in answers:
        torch.testing.assert_close(answer, torch.diag(3 * X.cos()))
    check(jac, 2)


# --- hooks on tensors ---


class Hook:
    """Multiplies by its scale."""

    scale = 3.0

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.scale * gradient


def rows_by_loops(model: nn.Linear) -> Tensor:
    """The Jacobian in the weight by plain autograd, which calls hooks for each row."""
    out = model(X)
    return torch.stack([torch.autograd.grad(y, model.weight, retain_graph=True)[0] for y in out])


def test_hooks_on_a_parameter_are_seen() -> None:
    model, hook = nn.Linear(3, 2, bias=False), Hook()
    jac = jacfunc.compile(jacfunc.module_jacobian(model), backend="replay")
    plain = jac(X)["weight"]
    torch.testing.assert_close(plain, rows_by_loops(model))
    handle = model.weight.register_hook(hook)
    for scale in (3.0, 5.0):
        hook.scale = scale
        for _ in range(2):
            torch.testing.assert_close(jac(X)["weight"], rows_by_loops(model))
        torch.testing.assert_close(jac(X)["weight"], scale * plain)
    handle.remove()
    torch.testing.assert_close(jac(X)["weight"], plain)


def test_hooks_do_not_act_twice_on_a_result_with_a_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    jac = compiled(lambda x: weight * x.sin())
    (before,) = torch.autograd.grad(jac(X).sum(), weight)
    torch.testing.assert_close(before, X.cos())
    weight.register_hook(lambda gradient: 3 * gradient)
    with pytest.raises(ValueError, match=r"^compile: .*without hooks where its result has"):
        jac(X)
    with torch.no_grad():
        check(jac, 1)


def test_hooks_on_what_is_saved_are_called() -> None:
    jac = compiled(torch.sin)
    check(jac, 1)
    with saved_tensors_hooks(lambda x: 2 * x, lambda x: x):
        torch.testing.assert_close(jac(X), torch.diag((2 * X).cos()))
    check(jac, 1)
    assert len(jac.compilations) == 1


# --- threads ---


def test_each_thread_has_its_own_settings_and_variables() -> None:
    local = threading.local()
    local.scale = 1.0
    variable = contextvars.ContextVar("variable", default=1.0)
    weight = torch.eye(3)
    jac = compiled(lambda x: local.scale * variable.get() * (weight @ x.sin()))
    check(jac, 1)

    def work(number: int) -> None:
        local.scale = 1.0 + number % 2
        variable.set(1.0 + number % 3)
        scale = local.scale * variable.get()
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 4 == 3):
            for factor in (1.0, 0.5, 2.0):
                answer = jac(factor * X)
                expected = scale * torch.diag((factor * X).cos())
                tolerance = 2e-2 if number % 4 == 3 else 1e-5
                torch.testing.assert_close(answer.float(), expected, rtol=tolerance, atol=1e-2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))
    check(jac, 1)


def test_what_one_thread_changes_another_sees() -> None:
    held = Held()
    jac = compiled(held.by_scale)
    check(jac, 2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(setattr, held, "scale", 3.0).result()
        check(jac, 3)
        pool.submit(check, jac, 3).result()


def test_a_change_between_two_calls_of_another_thread() -> None:
    """A trace is run only for the kind of surroundings that it was made for."""
    held = SimpleNamespace(scale=2.0, shift=-2.0)
    jac = compiled(lambda x: (held.scale + held.shift + 2.0) * x.sin())
    done = threading.Event()

    def work() -> None:
        scale = 2.0
        while not done.is_set():
            scale = 5.0 - scale
            held.scale = scale
            held.shift = -scale

    for held.scale in (2.0, 3.0):  # all kinds are traced before
        for held.shift in (-2.0, -3.0):
            check(jac, held.scale + held.shift + 2)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        answers = [jac(X)[0, 0] / X[0].cos() for _ in range(200)]
    finally:
        done.set()
        thread.join()
    # of two numbers that are written one after the other any pair may be there
    assert {round(float(each)) for each in answers} <= {1, 2, 3}
    held.scale, held.shift = 3.0, -2.0
    check(jac, 3)
    assert len(jac.compilations) == 4


# --- others ---


def test_what_is_compiled_inside_what_is_compiled() -> None:
    held = SimpleNamespace(scale=2.0)
    inner = compiled(lambda x: held.scale * x.sin())
    outer = compiled(lambda x: inner(x).sum(0))
    torch.testing.assert_close(outer(X), torch.diag(-2 * X.sin()))
    held.scale = 3.0
    torch.testing.assert_close(outer(X), torch.diag(-3 * X.sin()))


def test_a_module_with_a_plain_tensor() -> None:
    model: Any = Doubling()
    model.weight = torch.ones(3, 3)
    check(compiled(model), 2)


def test_a_model_that_is_pruned_later() -> None:
    model = nn.Linear(3, 3)
    jac = compiled(model)
    torch.testing.assert_close(jac(X), model.weight)
    prune.l1_unstructured(model, "weight", 4)
    for _ in range(2):
        torch.testing.assert_close(jac(X), model.weight_orig * model.weight_mask)


REFUSED: dict[str, tuple[Func, str]] = {
    "globals": (lambda x: globals()["SCALE"] * x.sin(), r"calls globals\(\)"),
    "eval": (lambda x: eval("SCALE") * x.sin(), r"calls eval\(\)"),
    "a file": (lambda x: len(open(__file__).read()) * x.sin(), r"calls open\(\)"),  # noqa: SIM115
    "whether there is a gradient": (
        lambda x: (2 if WEIGHT.grad is None else 3) * x.sin(),
        "read by .grad",
    ),
    "a matrix that is singular": (lambda x: x.sin() if inverts(MATRIX) else x, "decide what is"),
    "an index": (lambda x: x.sin() if has(INDEX, x) else x.cos(), "decide what is"),
    "a proxy": (lambda x: PROXY["scale"] * x.sin(), "got mappingproxy"),
    "an identity": (lambda x: x * TABLE.get(id(WEIGHT), 2.0), r"calls id\(\)"),
    "the thread": (lambda x: x * TABLE.get(threading.get_ident(), 2.0), r"calls get_ident\(\)"),
    "whether a file is there": (lambda x: x * os.path.exists("a"), r"calls exists\(\)"),
    "the size of a file": (lambda x: x * os.path.getsize(__file__), r"calls getsize\(\)"),
    "the text of a file": (lambda x: x * len(PLACE.read_text()), r"calls read_text\(\)"),
    "an array in a file": (lambda x: x * len(np.load("a.npy")), r"calls load\(\)"),
    "where it runs": (lambda x: x * len(os.getcwd()), r"calls getcwd\(\)"),
    "the day": (lambda x: x * datetime.date.today().day, r"calls today\(\)"),
    "how often a tensor was written": (lambda x: x * (1 + OTHER._version), "read by _version"),
    "where a tensor lies": (lambda x: x * (OTHER.data_ptr() % 7), "read by data_ptr"),
    "where it begins": (lambda x: x * (2 + OTHER.storage_offset()), "read by storage_offset"),
    "whether it is a leaf": (lambda x: x * (2 if OTHER.is_leaf else 3), "read by is_leaf"),
    "whether it has a graph": (lambda x: x * (2 if OTHER.grad_fn else 3), "read by grad_fn"),
    "whether it is shared": (lambda x: x * (2 if OTHER.is_shared() else 3), "read by is_shared"),
    "whether two are one": (lambda x: x * (2 if OTHER.is_set_to(X) else 3), "read by is_set_to"),
}
SCALE, PROXY = 2.0, types.MappingProxyType({"scale": 2.0})
TABLE: dict[int, float] = {}
PLACE, OTHER = Path(__file__), torch.ones(3)
WEIGHT, MATRIX, INDEX = torch.ones(3, requires_grad=True), torch.zeros(2, 2), torch.tensor([5])


def inverts(matrix: Tensor) -> bool:
    try:
        torch.linalg.inv(matrix)
    except torch.linalg.LinAlgError:
        return False
    return True


def has(index: Tensor, x: Tensor) -> bool:
    try:
        return bool(x[index].shape)
    except IndexError:
        return False


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_see_is_refused(name: str) -> None:
    func, words = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=f"^compile: .*{words}"):
        compiled(func)(X)
