"""Calls on the clock: their seconds, their order in rounds, and the most bytes that they hold."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch

from jacfunc._memory import PeakBytes

Name = TypeVar("Name")
Run = Callable[[], Any]
"""A call without arguments."""


def seconds_of(run: Run, device: torch.device) -> float:
    """Wall time of one call, to the end of what it launches on the device.

    Python collects no garbage meanwhile: that would be charged to whoever runs at the time. The
    result is freed after the clock has stopped.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _synchronize(device)
        start = time.perf_counter()
        result = run()
        _synchronize(device)
        seconds = time.perf_counter() - start
        del result
        return seconds
    finally:
        if was_enabled:
            gc.enable()


def shuffled(calls: Collection[Name], rounds: int) -> Iterator[list[Name]]:
    """The turns of each round: all calls in shuffled order, without those removed meanwhile.

    Rotating would leave every call behind the same neighbour, and what a neighbour leaves in the
    caches moved a ratio by a tenth.
    """
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(list(calls), len(calls))


def interleaved(
    runs: Mapping[Name, Run], rounds: int, device: torch.device
) -> dict[Name, list[float]]:
    """Seconds of every run in every round."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for turns in shuffled(runs, rounds):
        for name in turns:
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes that a call holds at once, its result among them, beyond those before it."""
    if device.type != "cuda":
        counter = PeakBytes()
        with counter:
            run()
        return counter.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def is_here(device: torch.device) -> bool:
    """Can calls on the device be measured? A fake of a device that is absent has no clock."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
