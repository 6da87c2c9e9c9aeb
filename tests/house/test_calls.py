"""In a settled call of a small problem few functions of jacfunc's own are called."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from tests.house.calls import is_own, num_calls
from tests.house.moves import problems

CALLS = 40  # after so many all that can be settled is, and what can be written down is written

# some more than alone, as other tests set up what is looked through; until Python 3.12 list
# comprehensions are functions
MOST = {
    "jacrev": 72,
    "module_jacobian, per sample": 210,
    "module_jacobian, by inputs": 152,
    "module_jacobian, by layers": 149,
    "ntk": 171,
    "ggn, diagonal": 271,
}


def own_calls_of(call: Callable[[], Any]) -> int:
    """How many functions of jacfunc a call runs, once all of its kind is known."""
    gc.disable()  # a collection lets states of modules go
    try:
        for _ in range(CALLS):
            call()
        return num_calls(call, is_own)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", MOST)
def test_settled_calls_call_few_functions(name: str) -> None:
    assert own_calls_of(problems()[name]) <= MOST[name]
