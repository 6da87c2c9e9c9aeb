"""In a settled call of a small problem few functions of jacfunc's own are called."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tests.house.moves import HOUSE, problems

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
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(HOUSE)

    gc.disable()  # a collection lets states of modules go
    try:
        for _ in range(CALLS):
            call()
        sys.setprofile(profile)
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("name", MOST)
def test_settled_calls_call_few_functions(name: str) -> None:
    assert own_calls_of(problems()[name]) <= MOST[name]
