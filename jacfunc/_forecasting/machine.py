"""How fast this machine is: small measurements, each made when it is first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import basis
from jacfunc._forecasting.recording import Operation
from jacfunc._linear_map import JacobianOperator, one_by_one
from jacfunc._lock import kept_property
from jacfunc._measuring import seconds_of
from jacfunc._memory import LARGE, give_back
from jacfunc._torch import outside_transforms
from jacfunc._types import Leaves

REPEATS, FEWEST, ENOUGH = 9, 3, 0.05
"""The most calls of a measurement, the fewest, and seconds after which it makes no more than these.

The fastest call counts: on a busy machine some take several times as long.
"""

SHORT, LONG = 2, 12
"""Links of two chains of tiny operations: their times differ by the time of the links between."""

OPERATIONS, LENGTH = 2, 4
"""How many operations a link has, and how long its vectors are."""

SMALLEST, SPACIOUS, LARGEST, FRESH = 4**8, 2**21, LARGE // 2 - 2**16, LARGE
"""Bytes of results: in a cache, in memory, the most that a heap uses again, in new pages.

Results larger than SPACIOUS are taken to need new pages. What a convolution makes on its way needs
them from LARGEST on: the heap keeps four blocks just smaller than half of LARGE, and most sweeps
have no more.
"""

TOUCHED = 2**21
"""Bytes that are written of a block of new pages: a measurement must not take much memory."""

MATRIX_BYTES, PAGE, PAGE_APART = 2**22, 2**12, 1.7
"""Bytes of a matrix that is read for one vector: more than the caches next to the processor. Rows
that lie a page apart share places in caches: to multiply few columns takes so many times longer."""

MANY_COLUMNS = 16
"""From this many columns on, the time of a product of matrices grows with their number."""

MOST_SEEDS, MOST_IMAGES = 256, 64
SIDE, FEW_CHANNELS = 16, 4
"""Side and channels of images that are convolved where no channels are taken together."""

BLOCKS = {"AVX512": 16, "AVX2": 8}
"""How many float32 numbers a vector unit takes at once."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a call takes: a part for the call itself, and a part for each operation."""

    call: float
    operation: float

    def seconds(self, operations: float) -> float:
        return self.call + operations * self.operation


Link: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Way: TypeAlias = Callable[[JacobianOperator], Callable[[], Any]]


def _cost_of(way: Way) -> kept_property[Machine, Cost]:
    """The cost of what a way does with an operator, measured when it is first asked for."""
    return kept_property(lambda machine: machine._cost(way))


def _push_batch(operator: JacobianOperator) -> Callable[[], Any]:
    return partial(operator.pushforward_batch, next(basis(operator.primals)))


class Machine:
    """How fast a machine does the parts of a sweep, on one device in one dtype."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        clock: Callable[[Callable[[], Any], torch.device], float] = seconds_of,
    ) -> None:
        self.device = device
        self._clock = clock
        self._dtype = dtype
        # a cache for each machine: one on the methods would keep all machines alive
        self._write, self._flop = cache(self._measure_write), cache(self._measure_flop)
        self._conv_flop = cache(self._measure_conv_flop)

    def know(self, costs: Mapping[str, Cost], **seconds: float) -> None:
        """Take these costs, by the names of properties, instead of what would be measured."""
        vars(self).update(costs, **seconds)

    def _ones(self, *shape: int) -> Tensor:
        with outside_transforms():  # nor does a count of memory outside see it
            return torch.ones(shape, device=self.device, dtype=self._dtype)

    def write(self, size: float, most: int = SPACIOUS) -> float:
        """Seconds to write a byte of a result of this size, in new pages if it is over ``most``."""
        return self._write(FRESH if size > most else power_of_four(size, SMALLEST, SPACIOUS))

    def flop(self, seeds: int, is_conv: bool, forward: bool) -> float:
        """Seconds of a multiplication or addition, in products with this many seeds at once."""
        seeds = power_of_four(seeds, 1, MOST_IMAGES if is_conv else MOST_SEEDS)
        return self._conv_flop(seeds, forward) if is_conv else self._flop(seeds)

    def multiply(self, op: Operation, seeds: int, forward: bool) -> float:
        """Seconds of the products of an operation with a seed, of so many at once."""
        if op.by_vector and not forward and 1 < seeds < MANY_COLUMNS:
            apart = 1.0 if op.by_vector % PAGE else PAGE_APART
            return op.flops * self.few_products * apart / (2 * seeds)
        flop = self.flop(seeds, op.is_conv, forward) if op.flops else 0.0
        if not (op.flops and op.is_conv) or seeds == 1:  # torch's own convolution takes one image
            return op.flops * flop
        times, size = op.filled_up(self.block, forward)
        return op.flops * flop * times + size * self.write(seeds * size, LARGEST)

    @kept_property
    def few_products(self) -> float:
        """Seconds for each number of a matrix whose transpose multiplies a few columns.

        Torch pulls rows back so through a product with a vector. Of up to fifteen columns MKL takes
        as long as of many, and longer than of one by one.
        """
        side = math.isqrt(MATRIX_BYTES // self._ones().element_size() // 4)
        matrix, columns = self._ones(side, side), self._ones(side, MANY_COLUMNS // 4)
        return self._seconds(lambda: matrix.t() @ columns) / side**2

    @property
    def block(self) -> int:
        """How many channels a convolution takes together: oneDNN fills vector units with them."""
        is_onednn = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        units = torch.backends.cpu.get_cpu_capability() if is_onednn else ""
        return BLOCKS.get(units, 1) if self._dtype == torch.float32 else 1

    evaluate = _cost_of(lambda operator: lambda: operator.unevaluated().outputs)
    """Cost of an evaluation that keeps its graph."""

    pull = _cost_of(lambda operator: partial(operator.pullback, operator.outputs))
    """Cost of a pullback of one cotangent."""

    pull_batch = _cost_of(lambda x: partial(x.pullback_batch, next(basis(x.outputs))))
    """Cost of a vmapped pullback."""

    push = _cost_of(lambda operator: partial(operator.pushforward, operator.primals))
    """Cost of a pushforward of one tangent."""

    push_batch = _cost_of(_push_batch)
    """Cost of a vmapped pushforward."""

    @kept_property
    def pull_each(self) -> Cost:
        """Cost of a row of several that are pulled back one by one, each copied to the others."""
        every = self._cost(lambda x: partial(one_by_one, x.pullback, next(basis(x.outputs))))
        return Cost(every.call / LENGTH, every.operation / LENGTH)

    @kept_property
    def scaling(self) -> float:
        """Seconds that a Python number among its arguments adds to an operation that is pushed."""
        scaled = self._cost(_push_batch, lambda x, _: x * 0.5 + 1)
        return max(scaled.operation - self.push_batch.operation, 0.0)

    def _measure_write(self, size: int) -> float:
        touched, number = min(size, TOUCHED), self._ones().element_size()
        source = self._ones(touched // number)

        def write() -> Tensor:
            whole = source.new_empty(size // number)
            return torch.add(source, source, out=whole[: len(source)])

        return self._seconds(write) / touched

    def _measure_flop(self, seeds: int) -> float:
        number = self._ones().element_size()
        side = 512 if seeds > 1 else math.isqrt(MATRIX_BYTES // number)
        matrix, vectors = self._ones(side, side), self._ones(seeds, side)
        product = (lambda: matrix @ vectors[0]) if seeds == 1 else (lambda: vectors @ matrix)
        return self._seconds(product) / (2 * side**2 * seeds)

    def _measure_conv_flop(self, seeds: int, forward: bool) -> float:
        """Seconds of a multiplication in a convolution whose channels fill the vector units."""
        channels = max(self.block, FEW_CHANNELS)
        images = self._ones(seeds, channels, SIDE, SIDE)
        kernel = self._ones(channels, channels, 3, 3)
        how: Any = None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1

        def convolve() -> Any:
            if forward:
                return torch.ops.aten.convolution(images, kernel, *how)
            asked = True, False, False
            return torch.ops.aten.convolution_backward(images, images, kernel, *how, asked)

        return self._seconds(convolve) / (seeds * 2 * channels**2 * 9 * SIDE**2)

    @torch.inference_mode(False)  # or its vectors could not be saved for a backward pass
    def _cost(self, way: Way, link: Link = lambda x, matrix: torch.tanh(matrix @ x)) -> Cost:
        matrix = self._ones(LENGTH, LENGTH) / 8

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
        """Seconds of the fastest of a few calls: slower ones were disturbed by other programs."""
        with outside_transforms(), torch.inference_mode(False), torch.enable_grad():
            run()
            times: list[float] = []
            while len(times) < FEWEST or (len(times) < REPEATS and sum(times) < ENOUGH):
                times.append(self._clock(run, self.device))
            del run
        give_back()  # or what measurements take would add up
        return min(times)


def power_of_four(number: float, least: int, most: int) -> int:
    """The nearest power of four within bounds, so that sizes near each other are measured once."""
    nearest = 4 ** round(math.log(max(number, 1), 4))
    return int(min(max(least, nearest), most))
