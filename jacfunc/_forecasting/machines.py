"""Which machine a forecast is for: the one that is here, or one whose figures are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from jacfunc._forecasting.machine import BLOCKS, FRESH, Cost, Machine

COSTS = {
    "evaluate": Cost(3.2e-5, 3.2e-6),
    "pull": Cost(1.9e-5, 3.2e-6),
    "pull_each": Cost(2.4e-5, 3.4e-6),
    "pull_batch": Cost(3.2e-5, 5.6e-6),
    "push": Cost(1.2e-4, 1.7e-5),
    "push_batch": Cost(1.4e-4, 2.8e-5),
}
"""Seconds on one core of a server."""


class KnownMachine(Machine):
    """A machine of which nothing is measured: a core of a server, and its caches."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._number = dtype.itemsize / 4
        self.know(COSTS, scaling=2e-4, few_products=1.2e-9 * self._number)

    def _measure_write(self, size: int) -> float:
        return 3.4e-10 if size == FRESH else 4e-11

    def _measure_flop(self, seeds: int) -> float:
        return self._number * (4e-11 if seeds == 1 else 1.2e-11)

    @property
    def block(self) -> int:
        return BLOCKS["AVX512"]

    def _measure_conv_flop(self, seeds: int, forward: bool) -> float:
        return self._number * 1.2e-11


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine for a device and a dtype, measured once in a process for a number of threads."""
    is_known = device.type == "cpu" and bool(_holders())
    return _machine(device, dtype, torch.get_num_threads(), is_known)


@cache
def _machine(device: torch.device, dtype: torch.dtype, threads: int, is_known: bool) -> Machine:
    return (KnownMachine if is_known else Machine)(device, dtype)


@cache
def _holders() -> list[None]:
    """One entry for each time that :func:`known_machine` is entered, by any thread."""
    return []


@contextmanager
def known_machine() -> Iterator[None]:
    """Forecasts for a CPU are made with the figures of one known machine, in all threads.

    The same strategies are then chosen on every machine, however busy it is: for tests, and for
    results that must be the same to the last bit. Nothing is measured. What was planned before
    keeps its plan.

    Example:
        >>> import torch, jacfunc, jacfunc.testing
        >>> with jacfunc.testing.known_machine():
        ...     jacfunc.jacobian(torch.sin)(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    _holders().append(None)
    try:
        yield
    finally:
        _holders().pop()
