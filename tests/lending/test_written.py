"""What a module writes into is put back, in whichever way and at whichever call it writes."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.modules import floats


class Writing(nn.Module):
    """Does something to itself from a certain evaluation on; who counts is not the module."""

    def __init__(self, does: Callable[[Any], Any], start: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.register_buffer("buffer", torch.ones(3))
        self.first.weight.grad = torch.ones(4, 3)
        self.steps, self.tensors, self.words = 0, [torch.ones(2)], {"seen"}
        self.counted, self.ordered = Counter("a"), OrderedDict(a=torch.ones(1))
        self.array, self.draws = np.ones(3), random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        inner = SimpleNamespace(steps=0, tensor=torch.ones(2), items=[torch.ones(2)])
        self.helper = SimpleNamespace(steps=0, tensor=torch.ones(3), inner=inner)
        self.teachers = [nn.BatchNorm1d(3)]
        calls = iter(range(10**6))
        self.act = lambda: does(self) if next(calls) >= start else None

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        output: Tensor = self.last(torch.tanh(self.first(x) + self.frozen(x)))
        return output


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


def by_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] = 3


WRITES: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda m: in_place(m.first.weight),
    "parameter by data": lambda m: m.first.weight.data.mul_(2),
    "parameter by numpy": lambda m: by_numpy(m.first.weight),
    "parameter's new data": lambda m: setattr(m.first.weight, "data", m.first.weight * 2),
    "parameter replaced": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(4, 3))),
    "gradient": lambda m: setattr(m.first.weight, "grad", None),
    "frozen": lambda m: in_place(m.frozen.weight),
    "frozen by data": lambda m: m.frozen.weight.data.mul_(2),
    "frozen by numpy": lambda m: by_numpy(m.frozen.weight),
    "one number of frozen": lambda m: m.frozen.bias.data[0].zero_(),
    "frozen to nan": lambda m: m.frozen.weight.data.fill_(torch.nan),
    "frozen's memory": lambda m: m.frozen.weight.untyped_storage().fill_(0),
    "frozen's new data": lambda m: setattr(m.frozen.weight, "data", m.frozen.weight * 2),
    "frozen's flag": lambda m: m.frozen.weight.requires_grad_(True),
    "frozen's gradient": lambda m: setattr(m.frozen.weight, "grad", torch.ones(4, 3)),
    "all by data": lambda m: [param.data.add_(1) for param in m.parameters()],
    "buffer by data": lambda m: m.buffer.data.add_(1),
    "buffer by numpy": lambda m: by_numpy(m.buffer),
    "new buffer": lambda m: m.register_buffer("late", torch.ones(1)),
    "number": lambda m: setattr(m, "steps", m.steps + 1),
    "list": lambda m: m.tensors.append(1),
    "tensor in a list": lambda m: m.tensors[0].data.mul_(2),
    "set": lambda m: m.words.add("late"),
    "subclass of dict": lambda m: m.counted.update("b"),
    "tensor in an ordered dict": lambda m: m.ordered["a"].mul_(2),
    "array": lambda m: m.array.__iadd__(1),
    "draws of Python": lambda m: m.draws.random(),
    "draws of a generator": lambda m: torch.rand(2, generator=m.generator),
    "number of an object": lambda m: setattr(m.helper, "steps", 1),
    "tensor of an object": lambda m: m.helper.tensor.mul_(2),
    "number of an inner object": lambda m: setattr(m.helper.inner, "steps", 1),
    "list of an inner object": lambda m: m.helper.inner.items[0].mul_(2),
    "new attribute of an object": lambda m: setattr(m.helper, "late", 1),
    "statistics of a teacher": lambda m: m.teachers[0](torch.ones(2, 3)),
    "teacher by data": lambda m: m.teachers[0].weight.data.mul_(2),
    "mode of a teacher": lambda m: m.teachers[0].eval(),
    "mode of a part": lambda m: m.first.eval(),
    "hook": lambda m: m.first.register_forward_hook(lambda *_: None),
}


def contents(item: Any, visited: set[int]) -> Any:
    """Bytes and identities of all that it is made of."""
    if isinstance(item, Tensor):
        grad = item.grad if item.is_leaf else None
        of_grad = None if grad is None else grad.numpy().tobytes()
        return id(item), item.requires_grad, item.detach().numpy().tobytes(), of_grad
    if isinstance(item, torch.Generator):
        return item.get_state().numpy().tobytes()
    if isinstance(item, np.ndarray):
        return item.tobytes()
    if isinstance(item, random.Random):
        return item.getstate()
    if isinstance(item, int | float | str | None) or id(item) in visited:
        return item if isinstance(item, int | float | str | None) else id(item)
    visited.add(id(item))
    if isinstance(item, dict):
        return id(item), [(key, contents(value, visited)) for key, value in item.items()]
    if isinstance(item, list | tuple | set):
        return id(item), [contents(value, visited) for value in item]
    own = vars(item) if isinstance(item, nn.Module | SimpleNamespace) else {}
    return id(item), [(k, contents(v, visited)) for k, v in own.items() if k not in TABLES]


TABLES = ("_parameters", "_buffers", "_modules")
"""Looked at apart: whoever asks may leave another dict with what was in it."""


def everything(module: nn.Module) -> Any:
    parts = [
        (name, [list(vars(part)[table].items()) for table in TABLES])
        for name, part in module.named_modules()
    ]
    visited: set[int] = set()
    tensors = [contents(x, visited) for x in (*module.parameters(), *module.buffers())]
    teachers = [contents(x, visited) for x in module.teachers[0].state_dict().values()]
    return (
        [(name, [[(k, id(v)) for k, v in table] for table in tables]) for name, tables in parts],
        tensors,
        [t[1:] for t in teachers],
        [contents(part, set()) for part in module.modules()],
        contents(module.teachers[0], set()),
    )


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def of(**options: Any) -> Callable[[nn.Module], Callable[[Tensor], Any]]:
    return lambda module: jacfunc.module_jacobian(module, **options)


def product(module: nn.Module) -> Callable[[Tensor], Any]:
    def ask(x: Tensor) -> Any:
        result = jacfunc.ggn(module, squared)(x, x[:, :2])
        vector = {n: torch.ones_like(p) for n, p in module.named_parameters() if p.requires_grad}
        return result.diagonal(), result @ vector, result @ vector

    return ask


DOORS: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "whole": of(),
    "looped samples": of(per_sample=True, strategy="looped"),
    "layers": of(per_sample=True, strategy="structured"),
    "inputs": of(wrt="inputs", per_sample=True),
    "stream": lambda m: lambda x: list(jacfunc.stream_jacobian(m, per_sample=True)(x)),
    "product": product,
}


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_is_as_it_was(write: str, start: int) -> None:
    for name, door in DOORS.items():
        module, x = Writing(WRITES[write], start).double(), floats(3, 3)
        ask = door(module)
        for _ in range(2):
            before = everything(module)
            with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):
                ask(x)
            assert everything(module) == before, name


@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
def test_a_late_write_is_undone_and_told_and_right_from_then_on(strategy: str) -> None:
    module, x = Writing(WRITES["frozen by data"], 10**6).double(), floats(1, 3)
    jac = jacfunc.module_jacobian(module, "inputs", strategy=strategy)
    for _ in range(3):
        jac(x)
    module.act = lambda: WRITES["frozen by data"](module)
    before = module.frozen.weight.clone()
    with pytest.raises(RuntimeError, match=r"module_jacobian.*'frozen.weight', which was undone"):
        jac(x)
    assert torch.equal(module.frozen.weight, before)
    result = jac(x)
    assert torch.equal(module.frozen.weight, before)
    module.act = lambda: None
    with torch.no_grad():
        module.frozen.weight.mul_(2)
    torch.testing.assert_close(result, jacfunc.module_jacobian(module, "inputs")(x))


def test_of_a_large_one_a_write_by_data_is_told() -> None:
    module = nn.Sequential(nn.Linear(3, 2**15).requires_grad_(False), nn.Linear(2**15, 2)).double()
    writes: list[int] = []

    def write(part: nn.Module, _: Any) -> None:
        if writes:
            part.weight.data.mul_(2)

    module[0].register_forward_pre_hook(write)
    jac, x = jacfunc.module_jacobian(module, select="1.bias", strategy="reverse"), floats(1, 3)
    jac(x)
    jac(x)
    writes.append(1)
    with pytest.raises(RuntimeError, match=r"got a write into '0.weight', which has changed it"):
        jac(x)
