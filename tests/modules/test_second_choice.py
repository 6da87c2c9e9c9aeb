"""Layers that are tried where samples under vmap were chosen, once calls by these are settled."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._settled import SettledBatch, SettledSamples
from jacfunc.testing import known_machine
from tests.house.calls import num_calls

CALLS = 50  # after so many it is known which way is the faster one
SIZE = 4
HOW = {"it goes": ""}
COUNT = {"evaluations": 0, "refused": 0}
TAKES: dict[Any, float] = {True: 0.0, False: 0.0, "now": 0.0}


@pytest.fixture(autouse=True)
def _same_plans() -> Iterator[None]:
    HOW["it goes"] = ""
    with known_machine():
        yield


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        COUNT["evaluations"] += 1
        is_batch = len(x) > 1  # under vmap it is one sample
        TAKES["now"] += TAKES[is_batch]
        y = self.last(self.norm(torch.tanh(self.first(x))))
        match HOW["it goes"]:
            case "not as a batch" if is_batch:
                COUNT["refused"] += 1
                raise ArithmeticError("too large")
            case "apart":
                return 3 * y
            case "by lot":
                return -y if random.random() < 0.2 else y
        return y


def points() -> Tensor:
    return torch.randn(SIZE, 3, dtype=torch.float64)


def loop(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Plain gradients, one row of one sample after the other."""
    params = dict(module.named_parameters())
    every = []
    for point in x:
        out = module(point[None])[0]
        rows = [torch.autograd.grad(y, [*params.values()], retain_graph=True) for y in out]
        every.append([torch.stack(block) for block in zip(*rows, strict=True)])
    return {n: torch.stack(b) for n, b in zip(params, zip(*every, strict=True), strict=True)}


def clock(monkeypatch: pytest.MonkeyPatch, by_layers: float, under_vmap: float) -> None:
    """Let an evaluation take so many seconds by each of the two ways."""
    TAKES.update({True: by_layers, False: under_vmap}, now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: TAKES["now"])


def is_vmap(frame: Any, event: str, _: Any) -> bool:
    return event == "call" and frame.f_code is SettledSamples._swept.__code__


def is_by_layers(jac: Callable[[Tensor], Any]) -> bool:
    """Is a call taken by layers, without a sweep under vmap?"""

    def is_made(frame: Any, event: str, _: Any) -> bool:
        return event == "call" and frame.f_code is SettledBatch.made.__code__

    x = points()
    return bool(num_calls(lambda: jac(x), is_made)) and not num_calls(lambda: jac(x), is_vmap)


def tried(module: nn.Module, calls: int = CALLS) -> Callable[[Tensor], Any]:
    """The Jacobian after so many calls, each of which is compared."""
    jac = jacfunc.module_jacobian(module, per_sample=True)
    for _ in range(calls):
        x = points()
        torch.testing.assert_close(jac(x), loop(module, x))
    return jac


@pytest.mark.parametrize("are_faster", [True, False])
def test_the_faster_way_is_kept(monkeypatch: pytest.MonkeyPatch, are_faster: bool) -> None:
    clock(monkeypatch, 1.0, 2.0 if are_faster else 0.5)
    module = Network()
    jac = tried(module)
    assert is_by_layers(jac) == are_faster
    for _ in range(80):  # batches are compared meanwhile
        x = points()
        torch.testing.assert_close(jac(x), loop(module, x))
    assert is_by_layers(jac) == are_faster
    x, COUNT["evaluations"] = points(), 0
    jac(x)
    assert COUNT["evaluations"] == 1


def test_no_call_is_evaluated_for_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.0, 2.0)
    jac = jacfunc.module_jacobian(Network(), per_sample=True)
    more_than_once = []
    for number in range(1, CALLS):
        COUNT["evaluations"] = 0
        jac(points())
        if COUNT["evaluations"] > 1:
            more_than_once.append(number)
    # the plan, comparisons, the first call by layers, and one that writes these down
    assert len(more_than_once) <= 10
    assert max(more_than_once) == 32


def test_a_second_choice_that_fails_is_tried_once() -> None:
    module, COUNT["refused"] = Network(), 0
    jac = tried(module, 16)
    for number in range(17, 2 * CALLS):
        HOW["it goes"] = "not as a batch" if number < 32 else ""  # then batches are compared
        x = points()
        made = jac(x)
        HOW["it goes"] = ""
        torch.testing.assert_close(made, loop(module, x))
    assert COUNT["refused"] == 1
    assert not is_by_layers(jac)


def test_layers_that_do_not_hold_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.0, 2.0)
    module = Network()
    jac = tried(module)
    HOW["it goes"] = "apart"
    x = points()
    torch.testing.assert_close(jac(x), loop(module, x))
    HOW["it goes"] = ""
    for _ in range(CALLS):
        x = points()
        torch.testing.assert_close(jac(x), loop(module, x))
        assert not is_by_layers(jac)


def test_rare_ways_are_taken_no_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.0, 2.0)
    module = Network()
    jac, x = tried(module), points()
    plain = jac(x)["last.bias"]
    HOW["it goes"] = "by lot"
    random.seed(0)
    share = sum(bool((jac(x)["last.bias"] != plain).any()) for _ in range(400)) / 400
    assert 0.14 < share < 0.26  # three standard errors
