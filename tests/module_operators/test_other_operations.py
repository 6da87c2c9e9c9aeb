"""A change that nobody sees but by the operations that are called: samples are compared anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc

SIZE = 5
NUMBERS = range(3, 8)
"""Calls before which batches are not compared by their count alone, but the fourth."""

REFUSED = r"do not depend on each other|as it is alone"


class Changing(nn.Module):
    """A layer, and what comes behind, from a list that no one watches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rest = nn.Linear(3, 3), [torch.tanh]
        self.gate = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0](self.layer(x))

    def gated(self, h: Tensor) -> Tensor:
        return h - self.gate * h.mean(0)


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def softmax(h: Tensor) -> Tensor:
    return h.softmax(0)


def by_first(h: Tensor) -> Tensor:
    return h * float(h.detach()[0, 0])


def product(model: nn.Module, x: Tensor) -> Any:
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return jacfunc.module_operator(model, per_sample=True)(x) @ vector


def pullback(model: nn.Module, x: Tensor) -> Any:
    return jacfunc.module_operator(model, per_sample=True)(x).T @ x


def by_inputs(model: nn.Module, x: Tensor) -> Any:
    return jacfunc.module_operator(model, "inputs", per_sample=True)(x) @ x


def of_ggn(model: nn.Module, x: Tensor) -> Any:
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return jacfunc.ggn(model, nn.functional.mse_loss)(x, x) @ vector


def of_fisher(model: nn.Module, x: Tensor) -> Any:
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return jacfunc.fisher(model, "gaussian")(x) @ vector


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("rest", [centred, softmax, by_first])
@pytest.mark.parametrize("door", [product, pullback, by_inputs, of_ggn, of_fisher])
def test_samples_that_are_coupled_by_a_later_call_are_refused(
    door: Callable[..., Any], rest: Callable[[Tensor], Tensor], number: int
) -> None:
    model, x = Changing(), torch.randn(SIZE, 3)
    for _ in range(number - 1):
        door(model, x)
    model.rest[0] = rest
    for _ in range(2):
        with pytest.raises((ValueError, NotImplementedError), match=REFUSED):
            door(model, x)
    model.rest[0] = torch.tanh
    door(model, x)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("door", [product, pullback, by_inputs])
def test_a_gate_that_opens_later_is_seen(door: Callable[..., Any], number: int) -> None:
    """No other operation is called, but one of those may mix samples."""
    model, x = Changing(), torch.randn(SIZE, 3)
    model.rest[0] = model.gated
    for _ in range(number - 1):
        door(model, x)
    model.gate.fill_(1.0)
    with pytest.raises(ValueError, match="do not depend on each other"):
        door(model, x)


def test_a_change_that_couples_no_samples_is_taken() -> None:
    model, x = Changing(), torch.randn(SIZE, 3, dtype=torch.float64)
    model.double()
    for rest in (torch.tanh, torch.sin, torch.tanh, torch.exp):
        model.rest[0] = rest
        found = product(model, x)
        _, expected = torch.func.jvp(
            lambda w, b, rest=rest: rest(x @ w.T + b),
            (model.layer.weight.detach(), model.layer.bias.detach()),
            (torch.ones(3, 3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)),
        )
        torch.testing.assert_close(found, expected)


def test_independence_that_is_insisted_on_is_looked_at_for_products() -> None:
    model, x = Changing(), torch.randn(SIZE, 3)
    model.rest[0] = centred
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    matrix = jacfunc.ggn(model, nn.functional.mse_loss, independent="always")(x, x)
    with pytest.raises(ValueError, match=r"ggn: .* do not depend on each other"):
        _ = matrix @ vector
    matrix = jacfunc.ggn(model, nn.functional.mse_loss, independent=True)(x, x)
    assert len(matrix @ vector) == 2


def test_a_vmap_inside_is_taken() -> None:
    """Its tensors have no numbers by which one could see whether it mixes samples."""
    model, x = Changing().double(), torch.randn(SIZE, 3, dtype=torch.float64)
    model.rest[0] = torch.vmap(lambda row: row - row.mean(0))
    expected = torch.ones(SIZE, 3, dtype=torch.float64) * x.sum(1, keepdim=True)
    found = product(model, x)
    torch.testing.assert_close(found, (expected + 1 - (expected + 1).mean(1, keepdim=True)))
