"""A module called again: changes since the last call count, and nothing else is computed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import jacfunc
from jacfunc._faults.nested import NestedWatch
from tests.truth.oracles import assert_same


class Changing(nn.Module):
    """Has something of whatever a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("shift", torch.ones(2))
        self.scale, self.kept, self.act = 2.0, [torch.ones(2)], torch.sin
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.scale * self.inner(x) * self.kept[0] + self.shift)


class Watched(Changing):
    """Counts the watches under which it is evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        modes = _get_current_function_mode_stack()
        WATCHES.extend(mode for mode in modes if isinstance(mode, NestedWatch))
        return super().forward(x)


WATCHES: list[NestedWatch] = []
"""Beside the module, whose own state is put back after a call."""


class Catching(Watched):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except ArithmeticError:
            return x


def weight(module: Any) -> Tensor:
    return module.inner[0].weight


def rename(module: Any) -> None:
    """Rename a submodule; submodules and their order stay."""
    parts = module.inner._modules
    parts["last"] = parts.pop("2")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "number": lambda m: setattr(m, "scale", 3.0),
    "function": lambda m: setattr(m, "act", torch.exp),
    "new attribute": lambda m: setattr(m, "more", torch.ones(2)),
    "list": lambda m: m.kept.__setitem__(0, torch.full((2,), 5.0).double()),
    "parameter": lambda m: setattr(m.inner[0], "weight", nn.Parameter(torch.ones(4, 3).double())),
    "parameter more": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(2))),
    "parameter gone": lambda m: setattr(m.inner[0], "bias", None),
    "parameter frozen": lambda m: weight(m).requires_grad_(False),
    "parameter tied": lambda m: setattr(m, "tied", weight(m)),
    "value": lambda m: weight(m).data.mul_(2),
    "value elsewhere": lambda m: setattr(weight(m), "data", torch.ones(4, 3).double()),
    "buffer": lambda m: setattr(m, "shift", torch.zeros(2).double()),
    "buffer written": lambda m: m.shift.mul_(2),
    "part": lambda m: m.inner.__setitem__(1, nn.Softplus()),
    "part more": lambda m: m.inner.append(nn.Softplus()),
    "part renamed": rename,
    "hook": lambda m: m.inner[1].register_forward_hook(lambda *_: _[-1] * 2),
    "hook before": lambda m: m.inner[1].register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
    "method": lambda m: setattr(m.inner[1], "forward", torch.exp),
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("wrt", ["params", "inputs"])
@pytest.mark.parametrize("what", CHANGES)
# a written parameter is what training looks like
@pytest.mark.filterwarnings("ignore:module_jacobian. create_graph must be True:UserWarning")
def test_a_change_between_two_calls_counts(what: str, wrt: Any, per_sample: bool) -> None:
    torch.manual_seed(0)
    module, x = Changing(), torch.rand(4, 3).double()
    derive = jacfunc.module_jacobian(module, wrt, per_sample=per_sample)
    derive(x)
    CHANGES[what](module)
    for _ in range(2):
        assert_same(derive(x), jacfunc.module_jacobian(module, wrt, per_sample=per_sample)(x))


def test_a_hook_that_is_gone_is_gone() -> None:
    module, x = Changing(), torch.rand(4, 3).double()
    handle = module.inner[1].register_forward_hook(lambda *_: _[-1] * 2)
    derive = jacfunc.module_jacobian(module)
    before = derive(x)
    handle.remove()
    assert not torch.equal(derive(x)["inner.0.bias"], before["inner.0.bias"])
    assert_same(derive(x), jacfunc.module_jacobian(module)(x))


def test_a_predicate_is_asked_at_every_call() -> None:
    names, x = ["inner.0.bias"], torch.rand(4, 3).double()
    derive = jacfunc.module_jacobian(Changing(), select=lambda name, _: name in names)
    assert list(derive(x)) == names
    names.append("inner.2.bias")
    assert list(derive(x)) == names


@pytest.mark.parametrize("per_sample", [False, True])
def test_what_torch_takes_for_a_constant_is_refused_at_a_later_call(per_sample: bool) -> None:
    module, x = Changing(), torch.rand(4, 3).double()
    derive = jacfunc.module_jacobian(module, per_sample=per_sample, strategy="reverse")
    derive(x)
    module.act = torch.special.bessel_j0
    with pytest.raises(NotImplementedError, match="bessel_j0"):
        derive(x)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("make", "most"), [(Watched, 0), (Catching, 1)], ids=["not", "where errors are caught"]
)
def test_what_met_nothing_is_not_watched_again(
    make: Callable[[], Watched], most: int, per_sample: bool
) -> None:
    module, x = make(), torch.rand(4, 3).double()
    derive = jacfunc.module_jacobian(module, per_sample=per_sample, strategy="reverse")
    for expected in (1, most):
        WATCHES.clear()
        derive(x)
        assert len(WATCHES) == expected
    module.register_forward_hook(ignore)
    WATCHES.clear()
    derive(x)
    assert len(WATCHES) == 1


def ignore(*_: Any) -> None:
    """A hook."""
