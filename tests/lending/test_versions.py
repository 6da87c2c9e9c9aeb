"""What is learned of a module is kept as long as the module is made of the same objects."""

from __future__ import annotations

import gc
from threading import Thread
from typing import Any
from weakref import ref

import pytest
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


# --- a state is shared by the doors of a module ---


class Watched(nn.Module):
    """How often its parts are looked for is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        LOOKS[0] += 1
        return super().named_modules(*args, **kwargs)


LOOKS = [0]


def kernel_by_loops(module: nn.Module, x: Tensor) -> Tensor:
    """``J Jᵀ`` with rows by plain autograd."""
    params = [p for p in module.parameters() if p.requires_grad]
    out = module(x)
    how: Any = {"retain_graph": True, "materialize_grads": True}  # some may not be used
    rows = [torch.autograd.grad(y, params, **how) for y in out.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return (J @ J.T).view(*out.shape, *out.shape).transpose(1, 2)


def test_the_parts_of_a_module_are_looked_for_once() -> None:
    module, x = Watched(), torch.randn(3, 3)
    jacfunc.ntk(module, None, x)
    LOOKS[0] = 0
    for _ in range(3):
        jacfunc.ntk(module, None, x)
        jacfunc.module_jacobian(module, per_sample=True)(x)
    assert LOOKS == [0]
    module.eval()
    jacfunc.ntk(module, None, x)
    assert LOOKS == [1]


CHANGES: dict[str, Any] = {
    "parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.randn(4, 3).double())),
    "submodule": lambda m: setattr(m, "first", nn.Linear(3, 4).double()),
    "requires_grad": lambda m: m.last.weight.requires_grad_(False),
    "written": lambda m: m.first.bias.data.add_(1),
    "hook": lambda m: m.first.register_forward_hook(lambda _, __, out: out.sin()),
    "forward": lambda m: setattr(m.first, "forward", torch.sin),
}


@pytest.mark.parametrize("what", [*CHANGES])
@pytest.mark.parametrize("calls", [1, 20])
def test_a_shared_state_is_that_of_the_module_now(what: str, calls: int) -> None:
    torch.manual_seed(0)
    module, x = Watched().double(), torch.randn(4, 3).double()
    if what == "forward":
        module.last = nn.Linear(3, 2).double()
        module.first.forward = torch.cos  # type: ignore[assignment]
    for _ in range(calls):
        jacfunc.ntk(module, None, x)
    for _ in range(2):
        CHANGES[what](module)
        for _ in range(2):
            torch.testing.assert_close(jacfunc.ntk(module, None, x), kernel_by_loops(module, x))


def test_a_module_that_leads_to_itself_is_collected_in_one_go() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for _ in range(3):
        jacfunc.ntk(module, None, torch.randn(5, 3))
    module[0].register_forward_hook(lambda *_, own=module: own.training and None)
    alive = ref(module), ref(module[0].weight)
    del module
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_threads_share_a_state() -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    expected, found = kernel_by_loops(module, x), list[Tensor]()

    def work() -> None:
        for _ in range(20):
            found.append(jacfunc.ntk(module, None, x))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for kernel in found:
        torch.testing.assert_close(kernel, expected)
