"""What a call has made is freed as it returns: none of it waits for Python's garbage collector.

Tensors in a cycle of references stay until the collector runs. Until then every call takes new
memory, and the heap grows.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.kinds.modules import MODULE_KINDS
from tests.kinds.public_names import OF_FUNCTIONS, OF_MODULES, Public
from tests.truth.doors import DOORS

IMPORTED_AT_A_CALL = ("torch._decomp.decompositions_for_jvp", "torch._dynamo")
"""Modules that torch imports when it first needs them. Meanwhile it keeps frames in cycles, and
with them the arguments of a call that waits for the import."""

CALLS = 2  # the first one learns what later ones know


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    for name in IMPORTED_AT_A_CALL:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there already, or each look would take half a second


def check(call: Callable[[], object]) -> None:
    """No tensor with memory stays in a cycle of references after a call.

    Traces are cycles of torch's own, of tensors that have no memory.
    """
    for number in range(CALLS):
        gc.collect()
        gc.disable()
        try:
            call()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = [x for x in gc.garbage if isinstance(x, Tensor) and not _is_empty(x)]
            shapes = [tuple(x.shape) for x in found]
        finally:
            found = []
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not shapes, f"call {number} has left tensors of these shapes to the collector"


def _is_empty(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.is_meta


def test_a_cycle_is_seen() -> None:
    def leave() -> None:
        kept: list[Any] = [torch.ones(3)]
        kept.append(kept)

    with pytest.raises(AssertionError, match=r"\[\(3,\)\]"):
        check(leave)


CALLED = [public for public in [*OF_FUNCTIONS, *OF_MODULES] if public.door != "check_jacobian"]
"""All but one that compares with finite differences, for which the function's float32 is coarse."""


@pytest.mark.parametrize("public", CALLED, ids=lambda public: public.door)
def test_public_names(public: Public) -> None:
    check(lambda: public.call(**public.good))


# --- modules ---

MODULES = "Linear", "CNN"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, door: str) -> None:
    kind = next(kind for kind in MODULE_KINDS if kind.name == name)
    opened = DOORS[door].open(kind.make())
    check(lambda: opened(kind.inputs()))
