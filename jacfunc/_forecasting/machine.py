"""How fast this machine is: small measurements, each made when it is first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from jacfunc._assembly import basis
from jacfunc._linear_map import JacobianOperator
from jacfunc._measuring import seconds_of
from jacfunc._memory import LARGE
from jacfunc._torch import outside_transforms
from jacfunc._types import Leaves

REPEATS, ENOUGH = 5, 0.05
SHORT, LONG = 2, 12
"""Links of two chains of tiny operations; their difference is the cost of the links between."""

OPERATIONS = 2
"""In a link."""

SMALLEST, LARGEST, FRESH = 4**8, 2**21, LARGE
"""Bytes of a result: what caches hold, what a heap hands out again, what needs fresh pages."""

MOST_SEEDS = 256
SIDE = 32


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: so much for itself, so much an operation."""

    call: float
    operation: float

    def seconds(self, operations: float) -> float:
        return self.call + operations * self.operation


Link: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Way: TypeAlias = Callable[[JacobianOperator], Callable[[], Any]]


class Machine:
    """Seconds of what sweeps are made of, on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._ones = partial(torch.ones, device=device, dtype=dtype)
        # caches of this machine's own: on the methods they would keep every machine alive
        self._write, self._flop = cache(self._measure_write), cache(self._measure_flop)
        self._conv_flop = cache(self._measure_conv_flop)

    def write(self, size: float) -> float:
        """Seconds a byte of a result that is so large."""
        return self._write(FRESH if size > LARGEST else power_of_four(size, SMALLEST, LARGEST))

    def flop(self, seeds: int, is_conv: bool, forward: bool) -> float:
        """Seconds a multiplication or addition in the products with so many seeds at once."""
        seeds = power_of_four(seeds, 1, MOST_SEEDS)
        return self._conv_flop(seeds, forward) if is_conv else self._flop(seeds)

    @cached_property
    def evaluate(self) -> Cost:
        """An evaluation that keeps its graph."""
        return self._cost(lambda operator: lambda: operator.unevaluated().outputs)

    @cached_property
    def pull(self) -> Cost:
        """A pullback of one cotangent."""
        return self._cost(lambda operator: partial(operator.pullback, operator.outputs))

    @cached_property
    def pull_batch(self) -> Cost:
        """A vmapped pullback."""
        return self._cost(_pull_batch)

    @cached_property
    def push(self) -> Cost:
        """A pushforward of one tangent."""
        return self._cost(lambda operator: partial(operator.pushforward, operator.primals))

    @cached_property
    def push_batch(self) -> Cost:
        """A vmapped pushforward."""
        return self._cost(_push_batch)

    @cached_property
    def scaling(self) -> float:
        """What a Python number among the arguments adds to an operation that is pushed through."""
        scaled = self._cost(_push_batch, lambda x, _: x * 0.5 + 1)
        return max(scaled.operation - self.push_batch.operation, 0.0)

    def _measure_write(self, size: int) -> float:
        given = self._ones(size // self._ones(()).element_size())
        return self._seconds(lambda: given + given) / size

    def _measure_flop(self, seeds: int) -> float:
        side = 512 if seeds > 1 else 2048
        matrix, vectors = self._ones(side, side), self._ones(seeds, side)
        product = (lambda: matrix @ vectors[0]) if seeds == 1 else (lambda: vectors @ matrix)
        return self._seconds(product) / (2 * side**2 * seeds)

    def _measure_conv_flop(self, seeds: int, forward: bool) -> float:
        """Few channels, as where whole Jacobians are taken."""
        first, last = self._ones(4, 1, 3, 3), self._ones(1, 4, 3, 3)

        def func(image: Tensor) -> tuple[Leaves, Leaves]:
            hidden = F.conv2d(image[None, None], first, padding=1)
            return (F.conv2d(hidden, last, padding=1)[0, 0],), ()

        operator = JacobianOperator(func, (self._ones(SIDE, SIDE),))
        sweep = (_push_batch if forward else _pull_batch)(operator, seeds)
        return self._seconds(sweep) / (seeds * 2 * 2 * 4 * 9 * SIDE**2)

    def _cost(self, way: Way, link: Link = lambda x, matrix: torch.tanh(matrix @ x)) -> Cost:
        matrix = self._ones(4, 4) / 8

        def chain(links: int) -> float:
            def func(x: Tensor) -> tuple[Leaves, Leaves]:
                for _ in range(links):
                    x = link(x, matrix)
                return (x,), ()

            return self._seconds(way(JacobianOperator(func, (matrix[0],))))

        short, long = chain(SHORT), chain(LONG)
        operation = max(long - short, 0.0) / (OPERATIONS * (LONG - SHORT))
        return Cost(max(short - OPERATIONS * SHORT * operation, 0.0), operation)

    def _seconds(self, run: Callable[[], Any]) -> float:
        """The least of a few calls: nobody is faster than he can be."""
        with outside_transforms(), torch.inference_mode(False), torch.enable_grad():
            run()
            found = [seconds_of(run, self.device)]
            while len(found) < REPEATS and sum(found) < ENOUGH:
                found.append(seconds_of(run, self.device))
            return min(found)


def _pull_batch(operator: JacobianOperator, seeds: int | None = None) -> Callable[[], Any]:
    return partial(operator.pullback_batch, next(basis(operator.outputs, seeds)))


def _push_batch(operator: JacobianOperator, seeds: int | None = None) -> Callable[[], Any]:
    return partial(operator.pushforward_batch, next(basis(operator.primals, seeds)))


@cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The one that all plans of this process share."""
    return Machine(device, dtype)


def power_of_four(number: float, least: int, most: int) -> int:
    """The nearest one within bounds: what is measured once for all sizes near it."""
    nearest = 4 ** round(math.log(max(number, 1), 4))
    return int(min(max(least, nearest), most))
