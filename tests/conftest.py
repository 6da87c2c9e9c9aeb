"""Device, seeds and threads, the same for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from jacfunc.testing import known_machine

DEVICE = os.environ.get("JACFUNC_TEST_DEVICE", "cpu")

# Two threads on a busy machine make small models many times slower.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """A strategy is chosen by what it computes, not by how busy the machine is."""
    known = known_machine()
    known.__enter__()
    config.add_cleanup(lambda: known.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.startswith("cuda"):
        return
    skip = pytest.mark.skip(reason="needs CUDA: set JACFUNC_TEST_DEVICE=cuda")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is there before the first test stays, and no collection of garbage looks through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Torch's compiler without what earlier tests have compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def device() -> str:
    return DEVICE
