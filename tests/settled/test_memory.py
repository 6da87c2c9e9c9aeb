"""What the call takes that writes a sweep down, beside those around it: allocations, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import jacfunc
from tests.settled.test_sweeps import num_sweeps

LOSS = F.cross_entropy
SETTLED, WRITTEN = 12, 24
"""After so many calls all is settled, and then written down."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def allocated(call: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that a call has allocated at once, and those that stay after it.

    Torch's allocator tells of each; no mode is set, in which no call is settled.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        call()
    every: Any = seen.profiler
    told = [x for x in every.kineto_results.events() if x.name() == "[memory]"]
    most, live = 0, 0
    for event in sorted(told, key=lambda x: x.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most, live


def deep(outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))


def module_door(outputs: int, ask: Callable[[nn.Module, Tensor], Any]) -> Callable[[], Any]:
    model = deep(outputs)
    return lambda: ask(model, torch.randn(6, 1, 24, 24))


def function_door() -> Callable[[], Any]:
    def waves(x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x.sin() + 1).log()
        return torch.stack([x.sum(), (x * x).sum()]).tanh()

    rows = jacfunc.jacrev(waves)
    return lambda: rows(torch.rand(30_000))


OPTIONS: Any = {"independent": True}  # no call compares batches, which takes more


def by_inputs(model: nn.Module, x: Tensor) -> Any:
    return jacfunc.module_jacobian(model, "inputs", per_sample=True, **OPTIONS)(x)


DOORS: dict[str, Callable[[], Callable[[], Any]]] = {
    "inputs": lambda: module_door(10, by_inputs),
    "inputs, of one output": lambda: module_door(1, by_inputs),
    "kernel": lambda: module_door(10, lambda f, x: jacfunc.ntk(f, None, x, **OPTIONS)),
    "norms": lambda: module_door(
        10, lambda f, x: jacfunc.gradient_norms(f, LOSS, **OPTIONS)(x, torch.arange(len(x)))
    ),
    "diagonal": lambda: module_door(
        10, lambda f, x: jacfunc.ggn(f, LOSS, **OPTIONS)(x, torch.arange(len(x))).diagonal()
    ),
    "a function": function_door,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_call_that_writes_down_takes_little_more_than_others(
    door: Callable[[], Callable[[], Any]],
) -> None:
    call = door()
    for _ in range(SETTLED):
        call()
    usual, _ = allocated(call)
    taken = [allocated(call) for _ in range(SETTLED + 1, WRITTEN)]
    assert not num_sweeps(call)  # it was among these
    most, live = map(max, zip(*taken, strict=True))
    assert most <= 1.2 * usual
    assert live <= usual / 50
