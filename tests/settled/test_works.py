"""Modules of torch's own layers, which later calls need not call any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import jacfunc
from tests.house.calls import num_calls
from tests.modules.test_settled_layers import Layers, assert_same, loop, normal
from tests.settled.test_sweeps import CLOSE, SIZES, after_many, by_inputs, by_params


def num_modules(call: Callable[[], Any]) -> int:
    """How many modules a call runs."""
    code: Any = nn.Module._call_impl.__code__
    return num_calls(call, lambda frame, event, _: event == "call" and frame.f_code is code)


def layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 3))


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(32, 4), nn.SiLU(True), nn.Linear(4, 3), nn.ReLU(True)
    )


def images() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Dropout(), nn.Flatten(), nn.Linear(16, 3))


def with_a_past() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3), nn.BatchNorm1d(3))


def nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())
    return nn.Sequential(inner, inner, nn.Flatten(), nn.Linear(32, 2, bias=False), nn.Softmax(1))


MODULES = {make.__name__: make for make in (layers, in_place, images, with_a_past, nested)}
DRAW = normal(2, 4, 4)


def change(module: nn.Module) -> None:
    """Other numbers in the same tensors."""
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            if x.is_floating_point():
                x.mul_(0.9).add_(0.01)


@SIZES
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torchs_own_layers_are_not_called_again(name: str, size: int) -> None:
    module = MODULES[name]().double().eval()
    both = jacfunc.module_jacobian(module, ("params", "inputs"), per_sample=True)
    inputs = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    params, flat = by_params(module), by_params(module, flat=True)
    for jac in (both, inputs, params, flat):
        after_many(jac, lambda: (DRAW(size),))
        x = DRAW(size)
        # of images and many samples auto takes the rows of both under vmap
        assert jac is both or num_modules(partial(jac, x)) == 0
    for _ in range(3):
        x = DRAW(size)
        rows, of_inputs = loop(module, x), by_inputs(module, x)
        assert_same(params(x), rows)
        torch.testing.assert_close(flat(x), torch.cat([b.flatten(2) for b in rows.values()], 2))
        torch.testing.assert_close(inputs(x), of_inputs, **CLOSE)
        assert_same(both(x)[0], rows)
        torch.testing.assert_close(both(x)[1], of_inputs, **CLOSE)
        change(module)


@SIZES
def test_kernels_and_norms_call_no_module(size: int) -> None:
    module, y = layers().double(), torch.randint(3, (size,))
    norms = after_many(jacfunc.gradient_norms(module, F.cross_entropy), lambda: (DRAW(size), y))
    ntk = after_many(lambda x: jacfunc.ntk(module, None, x, trace_axes=0), lambda: (DRAW(size),))
    for labels in (y, 2 - y):
        x = DRAW(size)
        assert num_modules(partial(norms, x, labels)) == num_modules(partial(ntk, x)) == 0
        rows = torch.cat([b.flatten(2) for b in loop(module, x).values()], 2)
        torch.testing.assert_close(ntk(x), torch.einsum("bkp,ckp->bc", rows, rows), **CLOSE)
        residuals = (module(x).softmax(1) - F.one_hot(labels, 3)).detach() / size
        expected = torch.einsum("bk,bkp->bp", residuals, rows).norm(dim=1)
        torch.testing.assert_close(norms(x, labels), expected, **CLOSE)
        change(module)
    with pytest.raises((IndexError, RuntimeError)):
        norms(x, y + 3)


def test_results_are_kept_apart() -> None:
    module, x = nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double(), DRAW(5)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (x,))
    first, second = jac(x), jac(x)
    first.zero_()
    torch.testing.assert_close(second, by_inputs(module, x), **CLOSE)
    torch.testing.assert_close(jac(x), second)


class Looking(nn.ReLU):
    """A layer of torch's, and a look at what it gets."""

    looks = 0

    def __getattr__(self, name: str) -> Any:
        Looking.looks += 1
        return super().__getattr__(name)


class Doubling(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Doubling.calls += 1
        return 2 * x


@pytest.mark.parametrize("kind", [Doubling, Looking, nn.Identity])
def test_code_of_users_runs_in_each_call(kind: type[nn.Module]) -> None:
    module = layers().double()
    module.append(kind())  # type: ignore[operator]
    if kind is nn.Identity:
        module[-1].extra = []  # a container leads to what nobody sees change
        module[-1].extra.append(module)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (DRAW(5),))
    x = DRAW(5)
    assert num_modules(lambda: jac(x)) == 6
    Doubling.calls = 0
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)
    assert kind is not Doubling or Doubling.calls == 6


def tripled(*args: Any, **kwargs: Any) -> Tensor:
    """What somebody may put in the place of a function of torch's."""
    x = args[0] if type(args[0]) is Tensor else args[1]
    return 3 * x + x**2


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """With something else in the place of what torch looks up."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in vars(owner) and not is_own:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def seen_by_all() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seen(module: Any) -> Iterator[None]:
    handle = module[2].register_forward_hook(lambda module, args, out: 2 * out)
    try:
        yield
    finally:
        handle.remove()


class Tripling(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return tripled(input)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a method of a class of layers": lambda module: instead(nn.ReLU, "forward", tripled),
    "a method of one layer": lambda module: instead(module[2], "forward", tripled),
    "a class": lambda module: instead(module[2], "__class__", Tripling),
    "a function of layers": lambda module: instead(F, "relu", tripled),
    "a function below": lambda module: instead(torch, "relu", tripled),
    "a method of tensors": lambda module: instead(
        Tensor, "flatten", lambda x, *dims: tripled(x).reshape(len(x), -1)
    ),
    "a method of all modules": lambda module: instead(
        nn.ReLU, "__call__", lambda layer, x: tripled(x)
    ),
    "a hook": seen,
    "a hook of all modules": lambda module: seen_by_all(),
    "values": lambda module: instead(module[1].weight, "data", module[1].weight.data * 3),
    "another parameter": lambda module: instead(
        module[1], "weight", nn.Parameter(module[1].weight.detach() * 3)
    ),
}


@SIZES
@pytest.mark.parametrize("name", CHANGES)
def test_what_layers_do_is_never_out_of_date(name: str, size: int) -> None:
    module = layers().double()
    jac = after_many(
        jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (DRAW(size),)
    )
    x = DRAW(size)
    before = by_inputs(module, x)
    assert num_modules(lambda: jac(x)) == 0
    for _ in range(2):
        with CHANGES[name](module):
            expected = by_inputs(module, x)
            assert not torch.allclose(expected, before)
            for _ in range(5):
                torch.testing.assert_close(jac(x), expected, **CLOSE)
        for _ in range(5):
            torch.testing.assert_close(jac(x), before, **CLOSE)


def curved() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.SiLU(), nn.Linear(4, 3)).double()


@SIZES
def test_kernels_are_looked_up_in_each_call(size: int) -> None:
    module, draw = curved(), lambda: (DRAW(size),)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), draw)
    x, kernels = DRAW(size), vars(torch._C)["_nn"]
    assert num_modules(lambda: jac(x)) == 0
    with instead(kernels, "silu", lambda x, *others: x**2):
        expected = by_inputs(module, x)
        for _ in range(3):
            torch.testing.assert_close(jac(x), expected, **CLOSE)


FACTOR = [1]
"""What code of a user's reads, of which nobody is told."""
FIND: Any = nn.Module.__getattr__


def scaled(module: nn.Module, name: str) -> Any:
    """What a layer finds under a name, where biases may be found scaled."""
    is_scaled = name == "bias" and FACTOR[0] != 1
    return FACTOR[0] * FIND(module, name) if is_scaled else FIND(module, name)


@SIZES
@pytest.mark.parametrize("decorate", [lambda func: func, torch.enable_grad()])
def test_what_stands_in_the_place_of_torchs_code_runs_in_each_call(
    decorate: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "__getattr__", decorate(scaled))
    module, draw = curved(), lambda: (DRAW(size),)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), draw)
    x = DRAW(size)
    for factor in (3, 5):
        monkeypatch.setattr(f"{__name__}.FACTOR", [factor])
        for _ in range(2):
            torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


@pytest.mark.parametrize("make", [nn.Sequential, Layers])
def test_torchs_search_for_nan_finds_those_of_each_call(make: type[nn.Sequential]) -> None:
    module = make(nn.Linear(3, 2), nn.Softplus()).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (x,))
    with torch.autograd.set_detect_anomaly(True):
        torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)
        with pytest.raises(RuntimeError, match="returned nan"):
            jac(x * torch.nan)


def test_values_in_lists_of_layers_are_compared() -> None:
    conv = nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect")
    module: Any = nn.Sequential(conv, nn.Flatten(), nn.Linear(48, 2)).double()
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (DRAW(5),))
    x = DRAW(5)
    assert num_modules(lambda: jac(x)) == 0
    conv._reversed_padding_repeated_twice[:] = [2, 0, 2, 0]
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


def test_torch_may_load_more_of_itself() -> None:
    module = layers().double()
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (DRAW(5),))
    x = DRAW(5)
    with another_name():
        assert num_modules(lambda: jac(x)) == 0
    assert num_modules(lambda: jac(x)) == 0


@contextmanager
def another_name() -> Iterator[None]:
    """With a name in torch that nobody looks up."""
    torch._of_a_test = 1  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del torch._of_a_test  # type: ignore[attr-defined]
