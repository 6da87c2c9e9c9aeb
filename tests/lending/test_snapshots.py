"""A module that was changed in whichever way is seen to be another one, also when asked again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import is_

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._lending.part import ModulePart
from jacfunc._lending.snapshot import Snapshot
from tests.house.calls import num_calls


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())
    model[2].kept, model[2].other = (number := 1000.5), number
    return model


def in_another_order(table: dict[str, object]) -> None:
    name, value = next(iter(table.items()))
    del table[name]
    table[name] = value


def renamed(table: dict[str, object]) -> None:
    name, value = table.popitem()
    table[f"{name}_"] = value


def replaced_dict(module: nn.Module) -> None:
    module.__dict__ = dict(vars(module))


WAYS: dict[str, Callable[[nn.Sequential], object]] = {
    "mode": lambda m: m[2].train(not m[2].training),
    "an equal number": lambda m: setattr(m[2], "kept", float("1000.5")),
    "another one in the dict": lambda m: vars(m[2]).update(kept=1),
    "one more": lambda m: setattr(m[2], "more", None),
    "one less": lambda m: delattr(m[2], "kept"),
    "one taken out": lambda m: vars(m[2]).pop("kept"),
    "none left": lambda m: vars(m[2]).clear(),
    "another order": lambda m: in_another_order(vars(m[2])),
    "another name": lambda m: renamed(vars(m[2])),
    "a default": lambda m: vars(m[2]).setdefault("more", 1),
    "joined": lambda m: vars(m[2]).__ior__({"kept": 1}),
    "set below": lambda m: object.__setattr__(m[2], "kept", 1),
    "the dict itself": lambda m: replaced_dict(m[2]),
    "a parameter": lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach())),
    "a parameter, in its table": lambda m: m[0]._parameters.update(bias=None),
    "parameters in another order": lambda m: in_another_order(m[0]._parameters),
    "another table": lambda m: vars(m[0]).update(_parameters=dict(m[0]._parameters)),
    "a buffer": lambda m: setattr(m[1], "running_mean", m[1].running_mean.clone()),
    "a first buffer": lambda m: m[2].register_buffer("more", None),
    "a first parameter": lambda m: m[2].register_parameter("more", None),
    "a hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "a registry": lambda m: vars(m[2]).update(_forward_hooks=OrderedDict()),
    "a submodule": lambda m: setattr(m, "2", nn.Tanh()),
    "one more submodule": lambda m: m.append(nn.Tanh()),
}


@pytest.mark.parametrize("asked", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_changes_are_seen(way: str, asked: int) -> None:
    model = network()
    snapshot = Snapshot([ModulePart.of(module) for module in model.modules()])
    assert all(snapshot.is_current() for _ in range(asked))
    WAYS[way](model)
    assert not snapshot.is_current()
    assert not snapshot.is_current()


@pytest.mark.parametrize("asked", [1, 2])
def test_what_is_put_back_is_current_again(asked: int) -> None:
    model = network()
    snapshot = Snapshot([ModulePart.of(module) for module in model.modules()])
    assert all(snapshot.is_current() for _ in range(asked))
    bias = model[0].bias
    model[0].bias = nn.Parameter(bias.detach())
    assert not snapshot.is_current()
    model[0].bias = bias
    assert snapshot.is_current()


class Keeping(nn.Module):
    """Keeps containers, of which evaluations get copies, and a table; it may keep more later."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.seen, self.table = {"a"}, [0], nn.Embedding(3, 2)
        self.linear, self.way = nn.Linear(2, 2), "plain"

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        if self.way == "replaces":
            self.seen = [2]
        if self.way == "deletes":
            del self.names
        if self.way == "adds":
            self.more = self.seen
        if self.way == "hooks":
            self.linear.register_forward_hook(lambda *_: None)
        out: Tensor = self.linear(x) + self.table.weight[0]
        return out


def test_what_is_lent_is_taken_back_without_a_look_at_every_part() -> None:
    module, x, give_back = Keeping(), torch.randn(3, 2), ModulePart.give_back.__code__
    jac = jacfunc.module_jacobian(module, per_sample=True)
    for _ in range(4):
        jac(x)
    assert not num_calls(lambda: jac(x), lambda frame, event, _: frame.f_code is give_back)
    assert module.seen == [0]
    assert not module.table.sparse


@pytest.mark.parametrize("way", ["replaces", "deletes", "adds", "hooks"])
def test_what_an_evaluation_changes_is_put_back_in_its_order(way: str) -> None:
    module, x = Keeping(), torch.randn(3, 2)
    jac = jacfunc.module_jacobian(module, per_sample=True)
    for _ in range(4):
        jac(x)
    module.way = way
    before = dict(vars(module))
    for _ in range(3):
        jac(x)
        assert [*vars(module)] == [*before]
        assert all(map(is_, vars(module).values(), before.values()))
        assert module.seen == [0]
        assert not module.linear._forward_hooks
