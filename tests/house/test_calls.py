"""In a settled call of a small problem few functions are called: jacfunc's own, and all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from tests.house.calls import is_call, is_own, num_calls
from tests.house.moves import problems

CALLS = 40  # after so many all that can be settled is, and what can be written down is written

# some more than alone, as other tests set up what is looked through; until Python 3.12 list
# comprehensions are functions
MOST = {
    "jacrev": (48, 135),
    "module_jacobian, per sample": (182, 543),
    "module_jacobian, by inputs": (108, 297),
    "module_jacobian, by layers": (110, 302),
    "ntk": (138, 378),
    "ggn, diagonal": (192, 528),
    "ggn, product": (196, 548),
    "gradient_norms": (118, 312),
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
