"""Sweeps that are written down: no graph is swept in later calls, and what they hold for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from gc import collect, get_objects
from threading import Thread
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.house.calls import num_calls
from tests.modules.test_settled_layers import KINDS, Layers, assert_same, loop, normal

CALLS = 40
"""After so many calls a sweep is written down, if it can be."""
SIZES = pytest.mark.parametrize("size", [1, 5])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def num_sweeps(call: Callable[[], Any]) -> int:
    """How many backward passes a call takes."""

    def is_sweep(frame: Any, event: str, function: Any) -> bool:
        return event == "c_call" and getattr(function, "__name__", "") == "run_backward"

    return num_calls(call, is_sweep)


def after_many(door: Callable[..., Any], draw: Callable[[], Any]) -> Callable[..., Any]:
    """The door, after so many calls that its sweep is written down, if it can be."""
    for _ in range(CALLS):
        door(*draw())
    return door


def by_params(module: nn.Module, **options: Any) -> Callable[..., Any]:
    return jacfunc.module_jacobian(module, per_sample=True, strategy="structured", **options)


def by_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Plain gradients of each sample's outputs in its own inputs."""
    rows = []
    for point in x:
        own = point[None].clone().requires_grad_()
        out = module(own).reshape(-1)
        rows.append([torch.autograd.grad(y, own, retain_graph=True)[0][0] for y in out])
    return torch.stack([torch.stack(row) for row in rows])


def network() -> nn.Sequential:
    return Layers(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@SIZES
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied"])
def test_no_graph_is_swept_by_parameters(kind: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double()
    jac = after_many(by_params(module), lambda: (draw(size),))
    x = draw(size)
    assert num_sweeps(lambda: jac(x)) == 0
    for _ in range(3):
        x = draw(size)
        assert_same(jac(x), loop(module, x))
        with torch.no_grad():
            for param in module.parameters():
                param.mul_(0.9)


class FirstOfRow(nn.Module):
    """A head that sees the first of several tokens, as classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.mix(tokens).tanh()[:, 0])


@SIZES
def test_no_graph_is_swept_where_a_layer_gets_part_of_a_tensor(size: int) -> None:
    module, draw = FirstOfRow().double(), lambda: normal(5, 3)(size)
    jac = after_many(by_params(module), lambda: (draw(),))
    x = draw()
    assert num_sweeps(lambda: jac(x)) == 0
    assert_same(jac(x), loop(module, x))


@SIZES
@pytest.mark.parametrize("kind", ["linear layers", "images", "attention"])
def test_no_graph_is_swept_by_inputs(kind: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double().eval()
    door = jacfunc.module_jacobian(module, "inputs", per_sample=True, strategy="reverse")
    jac = after_many(door, lambda: (draw(size),))
    x = draw(size)
    assert num_sweeps(lambda: jac(x)) == 0
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


class Reader(nn.Module):
    """A recurrent layer in float32, for whose backward pass a kernel keeps bytes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Any:
        return self.head(self.read(rows)[0][:, -1])


@pytest.mark.parametrize(("wrt", "size"), [("params", 1), ("inputs", 1), ("inputs", 5)])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_graph_is_swept_of_a_layer_whose_kernel_keeps_bytes(wrt: Any, size: int) -> None:
    module, draw = Reader(), lambda: torch.randn(size, 4, 3)
    jac = after_many(jacfunc.module_jacobian(module, wrt, per_sample=True), lambda: (draw(),))
    x = draw()
    assert num_sweeps(lambda: jac(x)) == 0
    if wrt == "params":
        for name, block in loop(module, x).items():
            torch.testing.assert_close(jac(x)[name], block)
    else:
        torch.testing.assert_close(jac(x), by_inputs(module, x))


def test_no_graph_is_swept_of_normalizations_that_keep_nothing() -> None:
    norm = nn.BatchNorm2d(4)
    module = Layers(nn.Conv2d(1, 4, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(64, 2))
    module.double().eval()
    norm.running_mean = torch.randn(4).double()
    draw = lambda: normal(1, 6, 6)(5)  # noqa: E731
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), lambda: (draw(),))
    x = draw()
    assert num_sweeps(lambda: jac(x)) == 0
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


@SIZES
def test_no_graph_is_swept_by_other_doors(size: int) -> None:
    module, draw = network(), lambda: normal(3)(size)
    x, y = draw(), torch.randint(2, (size,))
    rows = torch.cat([b.flatten(2) for b in loop(module, x).values()], 2)
    ntk = after_many(lambda x: jacfunc.ntk(module, None, x, trace_axes=0), lambda: (draw(),))
    assert num_sweeps(lambda: ntk(x)) == 0
    torch.testing.assert_close(ntk(x), torch.einsum("bkp,ckp->bc", rows, rows), **CLOSE)

    norms = after_many(jacfunc.gradient_norms(module, F.cross_entropy), lambda: (draw(), y))
    assert num_sweeps(lambda: norms(x, y)) == 0  # that of the loss is written down, too
    residuals = (module(x).softmax(1) - F.one_hot(y, 2)).detach() / size
    expected = torch.einsum("bk,bkp->bp", residuals, rows).norm(dim=1)
    torch.testing.assert_close(norms(x, y), expected, **CLOSE)
    other = 1 - y
    residuals = (module(x).softmax(1) - F.one_hot(other, 2)).detach() / size
    expected = torch.einsum("bk,bkp->bp", residuals, rows).norm(dim=1)
    torch.testing.assert_close(norms(x, other), expected, **CLOSE)


class Doubled(torch.autograd.Function):
    """A backward pass of a user's own, which tells how often it runs."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        Doubled.runs += 1
        return 2 * grad


def hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda grad: 3 * grad)
    return h


@pytest.mark.parametrize(
    "step",
    [Doubled.apply, hooked, lambda h: checkpoint(torch.sin, h, use_reentrant=False)],
    ids=["a function with its own backward", "a hook", "a checkpoint"],
)
def test_code_of_users_runs_in_each_sweep(step: Callable[[Tensor], Tensor]) -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return step(self.inner(x))

    module = Stepping()
    for door in (by_params(module), jacfunc.module_jacobian(module, "inputs", per_sample=True)):
        jac = after_many(door, lambda: (normal(3)(5),))
        x, runs = normal(3)(5), Doubled.runs
        assert num_sweeps(partial(jac, x)) > 0
        assert (Doubled.runs > runs) == (step == Doubled.apply)
    assert_same(by_params(module)(x), loop(module, x))


class ByNumpy(torch.autograd.Function):
    """The sine, with a backward pass that takes no several rows at once."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ByNumpy.runs += 1
        return torch.from_numpy(grad.numpy() * np.cos(ctx.saved_tensors[0].numpy()))


class After(nn.Module):
    """A network, and what becomes of its outputs."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.step = network(), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.inner(x))


def test_rows_that_were_refused_at_once_go_one_by_one_through_the_users_code_alone() -> None:
    module = After(ByNumpy.apply)
    jac = after_many(jacfunc.module_jacobian(module, "inputs", per_sample=True), points)
    x, runs = normal(3)(5), ByNumpy.runs
    assert num_sweeps(lambda: jac(x)) == 0
    assert ByNumpy.runs == runs + 2
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


def points() -> tuple[Tensor, ...]:
    return (normal(3)(5),)


LOOKS = {"masks": 0}


def masked(h: Tensor) -> Tensor:
    LOOKS["masks"] += 1
    mask = h > 0
    return h if mask.all() else h * mask


@pytest.mark.parametrize(("size", "evaluations"), [(1, 1), (5, 2)])
def test_no_graph_is_swept_where_python_reads_numbers(size: int, evaluations: int) -> None:
    module = After(masked)
    door = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    jac = after_many(door, lambda: (normal(3)(size),))
    x, LOOKS["masks"] = normal(3)(size), 0
    assert num_sweeps(lambda: jac(x)) == 0
    assert (
        LOOKS["masks"] == evaluations
    )  # of the batch, and of the sample that alone goes another way
    torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)
    with torch.no_grad():  # all samples go the other way
        module.inner[2].bias.fill_(9.0)
    for _ in range(5):
        torch.testing.assert_close(jac(x), by_inputs(module, x), **CLOSE)


HIDDEN: dict[str, Any] = {}


class Choosing(nn.Module):
    """Goes another way by what nobody sees, with the same operations on tensors of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        way = HIDDEN["way"]
        a, b = x.sin(), x.cos()
        h, g = self.first(b if way == "constants" else a), self.first(a)
        h, g = h.tanh(), g.tanh()
        if way == "branches":
            h, g = g, h * 1.0
        else:
            h = h * 1.0
        if way == "no graph":
            with torch.no_grad():
                g = g + h
        else:
            g = g + h
        first, second = HIDDEN["scales"]
        g = g + (g[:, :1] + HIDDEN["row"]).sum(1, keepdim=True)
        return self.last(h * first) + self.last(g * second) * (h - x).sum(1, keepdim=True)


@SIZES
@pytest.mark.parametrize("way", ["constants", "branches", "no graph", "scales", "row"])
def test_ways_with_the_same_operations_are_told_apart(way: str, size: int) -> None:
    same = torch.tensor(1.5, dtype=torch.float64)
    HIDDEN.update(way="", scales=(same, same), row=torch.ones(4))
    module = Choosing()
    params, inputs = by_params(module), jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for jac in (params, inputs):
        after_many(jac, lambda: (normal(3)(size),))
    if way == "scales":
        HIDDEN["scales"] = same, torch.tensor(-0.5, dtype=torch.float64)
    elif way == "row":
        HIDDEN["row"] = torch.ones(7)
    else:
        HIDDEN["way"] = way
    for _ in range(5):
        x = normal(3)(size)
        assert_same(params(x), loop(module, x))
        torch.testing.assert_close(inputs(x), by_inputs(module, x), **CLOSE)


WIRINGS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "multiples": lambda module, h: (2 * h, 3 * h),
    "layers": lambda module, h: (module.left(h), module.right(h)),
    "masks": lambda module, h: (h.masked_fill(module.mask, 0), h.masked_fill(~module.mask, 0)),
    "a script": lambda module, h: (scaled(h, 2.0), scaled(h, 3.0)),
    "unseen multiples": lambda module, h: (unseen(h, 2.0), unseen(h, 3.0)),
}


@torch.jit.script
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def unseen(x: Tensor, factor: float) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x * factor


class Wired(nn.Module):
    """Calls the same operations each time, and then goes on with either of two results."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([True, False, True, False]))
        self.name = name
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        one, other = WIRINGS[self.name](self, self.first(x))
        if HIDDEN["way"] == "other":
            one, other = other, one
        result: Tensor = self.last(one - 2 * other if HIDDEN["both"] else one * 2)
        return result


@SIZES
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", WIRINGS)
def test_which_results_an_operation_gets_counts(name: str, both: bool, size: int) -> None:
    HIDDEN.update(way="one", both=both)
    module = Wired(name)
    params, inputs = by_params(module), jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for jac in (params, inputs):
        after_many(jac, lambda: (normal(3)(size),))
    for way in ("other", "one"):
        HIDDEN["way"] = way
        x = normal(3)(size)
        assert_same(params(x), loop(module, x))
        torch.testing.assert_close(inputs(x), by_inputs(module, x), **CLOSE)


AS_NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a slope": lambda h, number: F.leaky_relu(h, number),  # type: ignore[arg-type]
    "a multiple": lambda h, number: torch.add(h.sin(), h.cos(), alpha=number),  # type: ignore[call-overload]
    "a bound": lambda h, number: F.hardtanh(h, -1.0, number),  # type: ignore[arg-type]
    "a place": lambda h, number: h[:, number.long() : number.long() + 2].repeat(1, 2),
    "a factor that nobody sees": lambda h, number: unseen(h, float(number)),
    "a start": lambda h, number: h.narrow(1, number.long(), 2).repeat(1, 2),
}


@SIZES
@pytest.mark.parametrize("name", AS_NUMBERS)
def test_numbers_that_operations_read_from_tensors_count(name: str, size: int) -> None:
    """No argument tells such a number, which a backward pass has for its own."""

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("number", torch.tensor(0.5))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(AS_NUMBERS[name](self.first(x), self.number))  # type: ignore[arg-type, no-any-return]

    module = Reading()
    params, inputs = by_params(module), jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for jac in (params, inputs):
        after_many(jac, lambda: (normal(3)(size),))
    for number in (2.0, 0.25, 1.5):
        module.number.fill_(number)  # type: ignore[operator]
        x = normal(3)(size)
        assert_same(params(x), loop(module, x))
        torch.testing.assert_close(inputs(x), by_inputs(module, x), **CLOSE)


class Writing(nn.Module):
    """Writes into a result that a backward pass needs, or into a tensor that it does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y, other = h.sin(), torch.ones_like(h)
        with torch.no_grad():
            (h if HIDDEN["way"] == "needed" else other).mul_(2)
        result: Tensor = self.last(y)
        return result


@SIZES
def test_writes_into_what_was_saved_are_refused_as_by_torch(size: int) -> None:
    HIDDEN["way"] = "not needed"
    module = Writing()
    params, inputs = by_params(module), jacfunc.module_jacobian(module, "inputs", per_sample=True)
    ntk = partial(jacfunc.ntk, module, None)
    for door in (params, inputs, ntk):
        after_many(door, lambda: (normal(3)(size),))
    x = normal(3)(size)
    assert num_sweeps(lambda: inputs(x)) == 0
    torch.testing.assert_close(inputs(x), by_inputs(module, x), **CLOSE)
    HIDDEN["way"] = "needed"
    for door in (params, inputs, ntk):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            door(x)


def test_settings_of_torch_count() -> None:
    module = network()
    jac = after_many(by_params(module), lambda: (normal(3)(5),))
    x = normal(3)(5)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        assert_same(jac(x), loop(module, x))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert_same(jac(x), loop(module, x))


def test_threads_take_turns() -> None:
    module = network()
    jac = after_many(by_params(module), lambda: (normal(3)(5),))
    points = [normal(3)(5) for _ in range(8)]
    results: dict[int, Any] = {}

    def take(number: int) -> None:
        for _ in range(20):
            results[number] = jac(points[number])

    threads = [Thread(target=take, args=(number,)) for number in range(len(points))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(points):
        assert_same(results[number], loop(module, x))


def test_no_result_is_memory_of_the_sweep() -> None:
    module = network()
    jac = after_many(by_params(module, flat=True), lambda: (normal(3)(5),))
    x = normal(3)(5)
    first = jac(x)
    before = first.clone()
    first.zero_()
    second = jac(x)
    assert torch.equal(second, before)
    jac(normal(3)(5))
    assert torch.equal(second, before)


def test_what_was_computed_is_not_kept() -> None:
    def live() -> int:
        collect()
        tensors = [x for x in get_objects() if type(x) is Tensor and x.dtype is torch.float32]
        return sum(x.nbytes for x in tensors if x.layout is torch.strided)

    module = Layers(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    jac = by_params(module)
    draw = lambda: (torch.randn(16, 64),)  # noqa: E731
    for _ in range(5):
        result = jac(*draw())
    size = sum(block.nbytes for block in result.values())
    del result
    before = live()
    after_many(jac, draw)
    assert num_sweeps(lambda: jac(*draw())) == 0
    assert live() - before < size / 10


def test_a_module_is_not_kept_alive() -> None:
    module = network()
    for _ in range(CALLS):
        jacfunc.ntk(module, None, normal(3)(5))
    seen = ref(module)
    del module
    collect()
    assert seen() is None
