"""Attention in written sweeps: its kernel is chosen where it may run, and what begins to attend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jacfunc._torch import MathAttention
from tests.house.calls import num_calls
from tests.modules.test_settled_layers import KINDS, assert_same, loop
from tests.settled.test_sweeps import SIZES, after_many, by_params, num_sweeps


def num_choices(call: Any) -> int:
    """How often a call chooses the kernel of attention."""
    code = MathAttention.__enter__.__code__
    return num_calls(call, lambda frame, event, _: event == "call" and frame.f_code is code)


@torch.jit.script
def attend_unseen(h: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(h, h, h)


class Attends(nn.Module):
    """Attends from some call on, by an operation that modes see, or by one that they do not."""

    def __init__(self, unseen: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.unseen, self.is_late = unseen, [False]
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.is_late[0]:
            h = attend_unseen(h) if self.unseen else F.scaled_dot_product_attention(h, h, h)
        return self.last(h.mean(1))


@SIZES
@pytest.mark.parametrize("kind", ["linear layers", "images", "attention"])
def test_a_kernel_is_chosen_where_attention_runs(kind: str, size: int) -> None:
    make, draw = KINDS[kind]
    jac = after_many(by_params(make().double()), lambda: (draw(size),))
    x = draw(size)
    assert num_choices(lambda: jac(x)) == (kind == "attention")
    assert num_sweeps(lambda: jac(x)) == 0


@SIZES
@pytest.mark.parametrize("unseen", [False, True])
def test_what_begins_to_attend_is_seen(unseen: bool, size: int) -> None:
    module = Attends(unseen)
    draw = lambda: torch.randn(size, 3, 4, dtype=torch.float64)  # noqa: E731
    jac = after_many(by_params(module), lambda: (draw(),))
    assert num_choices(lambda: jac(draw())) == 0
    module.is_late[0] = True
    for _ in range(5):
        x = draw()
        assert num_choices(lambda: jac(x)) > 0  # noqa: B023
        assert_same(jac(x), loop(module, x))
    module.is_late[0] = False
    x = draw()
    assert_same(jac(x), loop(module, x))
