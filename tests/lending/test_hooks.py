"""Modules whose hooks collect gradients of samples, as libraries for private training set them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kinds.modules import floats
from tests.truth.doors import DOORS, truth_of

B = 4
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Collecting(nn.Module):
    """Hooks keep what goes into layers in lists, and take it out again in the backward pass.

    Beside each parameter they count the passes, and keep the gradient of every sample.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for layer in self.layers():
            for param in layer.parameters():
                param.passes = 0  # type: ignore[attr-defined]
            layer.register_forward_hook(self.keep)
            layer.register_full_backward_hook(self.collect)

    def layers(self) -> list[nn.Module]:
        return [layer for layer in self.net if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    @staticmethod
    def keep(layer: Any, inputs: Any, out: Tensor) -> None:
        if torch.is_grad_enabled():
            layer.kept = [*getattr(layer, "kept", ()), inputs[0].detach()]
            for param in layer.parameters():
                param.passes += 1

    @staticmethod
    def collect(layer: Any, to_inputs: Any, to_outputs: Any) -> None:
        x = layer.kept.pop()
        layer.weight.of_samples = torch.einsum("bo,bi->boi", to_outputs[0], x)
        for param in layer.parameters():
            param.passes -= 1
            assert param.passes >= 0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_right(door: str) -> None:
    module, x = Collecting(net()), floats(B, 3).double()
    call = DOORS[door].open(module)
    for seed in (1, 2):
        batch = (x * seed,)
        got = call(batch)
        expected = DOORS[door].expected(truth_of(net(), batch), module)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("door", DOORS)
def test_what_hooks_keep_is_as_before(door: str) -> None:
    """A training step after the call collects what it would have collected without."""
    module, x = Collecting(net()), floats(B, 3).double()
    DOORS[door].open(module)((x,))
    module(x).sum().backward()
    other = Collecting(net())
    other(x).sum().backward()
    for layer, same in zip(module.layers(), other.layers(), strict=True):
        weight: Any = layer.weight
        assert weight.passes == 0
        assert layer.kept == []
        assert torch.equal(weight.of_samples, same.weight.of_samples)  # type: ignore[union-attr]
