"""One call on the clock, calls of many in rounds, and one untimed call for the peak."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from jacfunc._memory import PeakBytes

Name = TypeVar("Name")
Run = Callable[[], Any]


def seconds(run: Run, cuda: bool) -> float:
    """Wall time of one call; the answer is freed after the clock has stopped."""
    with uncollected():
        return seconds_of(run, torch.device("cuda" if cuda else "cpu"))


def timed(run: Run, cuda: bool) -> tuple[float, Any]:
    """Wall time of one call, and its answer."""
    kept: list[Any] = []
    return seconds(lambda: kept.append(run()), cuda), kept[0]


def interleaved(runs: Mapping[Name, Run], rounds: int, cuda: bool) -> dict[Name, list[float]]:
    """Seconds of every run in every round."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for turns in shuffled(runs, rounds):
        for name in turns:
            times[name].append(seconds(runs[name], cuda))
    return times


def shuffled(racing: Collection[Name], rounds: int) -> Iterator[list[Name]]:
    """All that race, in another order each round; who leaves between rounds has no more turns.

    Rotating would leave everyone behind the same neighbour, and what a neighbour leaves in the
    caches moved a ratio by a tenth.
    """
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(list(racing), len(racing))


def peak_bytes(run: Run, cuda: bool) -> int:
    """Most bytes that one call holds at once, its answer included, above what was held before."""
    if not cuda:
        counter = PeakBytes()
        with counter:
            run()
        return counter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: it would be charged to whoever runs at the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """One call, to the end of what it launches; its result is freed after the clock has stopped."""
    _synchronize(device)
    start = time.perf_counter()
    result = run()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_here(device: torch.device) -> bool:
    """Can it be measured, which no fake of an absent device can?"""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
