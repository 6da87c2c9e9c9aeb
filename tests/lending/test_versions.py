"""What is learned of a module is kept as long as the module is made of the same objects."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._lending import CurrentState


class Settings:
    """An object that a module keeps beside its tensors."""

    def __init__(self) -> None:
        self.scale = 1.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.settings, self.calls = nn.Linear(3, 2), Settings(), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.settings.calls = getattr(self.settings, "calls", 0)
        out: Tensor = self.layer(x) * self.settings.scale
        return out


def version_of(module: nn.Module, select: Any = None) -> object:
    return CurrentState("test", module, select).now().version


def test_states_made_anew_have_one_version() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    version = version_of(module)
    assert version_of(module) is version
    assert version_of(module, "*.weight") is not version
    assert version_of(module) is version
    module.eval()
    assert version_of(module) is not version


def test_a_change_beside_the_module_is_another_version() -> None:
    module = Scaled()
    version = version_of(module)
    assert version_of(module) is version
    module.settings.scale = 2.0
    assert version_of(module) is not version


def test_a_new_parameter_or_hook_is_another_version() -> None:
    module = nn.Linear(3, 2)
    versions = [version_of(module)]
    module.weight = nn.Parameter(torch.ones(2, 3))
    versions.append(version_of(module))
    module.register_forward_hook(lambda *_: None)
    versions.append(version_of(module))
    assert len(set(map(id, versions))) == 3


def test_a_version_keeps_no_module_alive() -> None:
    module = nn.Linear(3, 2)
    jacfunc.ntk(module, None, torch.ones(4, 3))
    alive = ref(module)
    del module
    assert alive() is None


def test_ntk_evaluates_a_known_module_once() -> None:
    """A door that makes a state at each call finds what earlier calls have learned."""
    module, calls = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), [0]
    x = torch.randn(5, 3)

    def count(*_: object) -> None:
        calls[0] += 1

    module.register_forward_hook(count)
    for _ in range(2):
        jacfunc.ntk(module, None, x)
    calls[0] = 0
    jacfunc.ntk(module, None, x)
    assert calls == [1]


def test_a_call_leaves_nothing_for_the_garbage_collector() -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    jacobian = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for _ in range(4):
        jacobian(x)
    gc.collect()
    gc.disable()
    left = []
    try:
        for _ in range(3):  # others in this process may leave something, too
            jacobian(x)
            left.append(gc.collect())
    finally:
        gc.enable()
    assert min(left) == 0
