"""In a settled call of a small problem few functions are called: jacfunc's own, and all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.house.calls import is_call, is_own, num_calls
from tests.house.moves import problems

CALLS = 40  # after so many all that can be settled is, and what can be written down is written

# some more than alone, as other tests set up what is looked through; until Python 3.12 list
# comprehensions are functions
MOST = {
    "jacrev": (48, 135),
    "module_jacobian, per sample": (182, 545),
    "module_jacobian, by inputs": (38, 112),
    "module_jacobian, by layers": (36, 113),
    "ntk": (63, 186),
    "a user's, by inputs": (108, 298),
    "a user's, by layers": (110, 302),
    "a user's, ntk": (138, 382),
    "a user's, gradient_norms": (118, 312),
    "a user's, ggn product": (196, 548),
    "ggn, diagonal": (192, 528),
    "ggn, product": (113, 318),
    "gradient_norms": (43, 118),
    "lstsq": (357, 920),
}


def calls_of(call: Callable[[], Any]) -> tuple[int, int]:
    """How many functions a call runs, once all of its kind is known: jacfunc's own, and all."""
    gc.disable()  # a collection lets states of modules go
    try:
        for _ in range(CALLS):
            call()
        return num_calls(call, is_own), num_calls(call, is_call)
    finally:
        gc.enable()
        gc.collect()  # while a module dies Python 3.11 would lose count of its weak references


@pytest.mark.parametrize("name", MOST)
def test_settled_calls_call_few_functions(name: str) -> None:
    call = problems()[name]
    own, every = calls_of(call)
    assert own <= MOST[name][0]
    assert every <= MOST[name][1]


class Reader(nn.Module):
    """It keeps lists of weights, of their names, and of weak references to them, as LSTMs do."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.head(self.read(x)[0][:, -1])
        return last


def test_settled_calls_of_a_recurrent_network_call_few_functions() -> None:
    jac, x = jacfunc.module_jacobian(Reader(), per_sample=True), torch.randn(1, 5, 3)
    own, every = calls_of(lambda: jac(x))
    assert own <= 216
    assert every <= 600
