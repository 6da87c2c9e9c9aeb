"""How many samples of a batch a kernel takes at once, so that it keeps to a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jacfunc._kernels.blocks import KeptAxes, SampleRange
from jacfunc._kernels.sampled_function import KernelSamples
from jacfunc._memory import GROWTH, Budget, PeakBytes


@dataclass(frozen=True)
class BlockBytes:
    """What was counted for some samples of a side, and a block of the kernel with as many.

    Args:
        size: how many samples.
        made: the most bytes while their rows were made.
        rows: bytes of their rows, which are there as long as blocks are made of them.
        block: the most bytes beside these while a block was made.
        result: bytes of the block itself.
    """

    size: int
    made: int
    rows: int
    block: int
    result: int

    @classmethod
    @torch.no_grad()
    def of(cls, samples: KernelSamples, size: int, axes: KeptAxes) -> BlockBytes:
        """The bytes of the first samples of a batch, counted while rows and a block are made."""
        with PeakBytes() as making:
            every = SampleRange(samples, 0, size).rows(axes)
        rows, peaks = making.live, []
        for others in (every, [replace(rows_of_leaf) for rows_of_leaf in every]):
            with PeakBytes() as counter:  # with itself, half is computed, in another way
                blocks = [left.times(right) for left, right in zip(every, others, strict=True)]
            peaks.append(counter.peak)
        return cls(size, making.peak, rows, max(peaks), sum(block.nbytes for block in blocks))

    def fitting(self, room: int) -> int:
        """How many samples take at most so many bytes.

        Rows of k times as many take at most k times as much, and a block at most k² times.
        """
        slope, curve = self.rows / self.size, self.block / self.size**2
        root = math.sqrt(slope**2 + 4 * curve * room)
        of_block = 2 * room / (slope + root) if root else math.inf
        of_rows = room * self.size / max(self.made, 1)
        return int(min(of_block, of_rows, 2**62))

    @property
    def needed(self) -> int:
        """The bytes that a half of the room must have for these samples."""
        return max(self.made, self.rows + self.block)


def in_ranges(
    sides: Sequence[Sequence[KernelSamples]], axes: KeptAxes, most: int | None, budget: Budget
) -> list[list[SampleRange]]:
    """The samples of each side in ranges, as large as the budget allows, and at most as ``most``.

    The rows of a range of the first side take up to half of what the result leaves, those of one of
    the second side, and their block, the other half.

    Raises:
        ValueError: if one sample of each side takes more than the budget.
    """
    if budget.is_open:
        return [_cut(side, [most or samples.size for samples in side]) for side in sides]
    totals, every = [sum(samples.size for samples in side) for side in sides], []
    for side in sides:
        steps = []
        for samples in side:
            if samples.size:  # the first evaluation learns, and takes more
                with samples.evaluated(0, min(2, samples.size)):
                    pass
            steps.append(_fitting(samples, axes, most, budget, totals[0] * totals[-1]))
        every.append(_cut(side, steps))
    return every


def _fitting(
    samples: KernelSamples, axes: KeptAxes, most: int | None, budget: Budget, entries: int
) -> int:
    """How many samples of one batch fit; ``entries`` are the pairs of samples in the kernel."""
    most = min(most or samples.size, samples.size)
    if not most:
        return 1
    counted = BlockBytes.of(samples, 1, axes)
    room = budget.beside(counted.result * entries)
    assert room is not None
    if counted.needed > room // 2:
        budget.check_work(2 * counted.needed, counted.result * entries)
    size = 1
    for at_most in (min(2, most), most):  # counted again, as some of it does not grow with samples
        fitting = max(1, min(at_most, counted.fitting(room // 2)))
        if size <= fitting <= GROWTH * size:
            break
        size = fitting
        counted = BlockBytes.of(samples, size, axes)
    return max(1, min(size, counted.fitting(room // 2)))


def _cut(side: Sequence[KernelSamples], steps: Sequence[int]) -> list[SampleRange]:
    return [
        SampleRange(samples, start, min(start + step, samples.size))
        for samples, step in zip(side, steps, strict=True)
        for start in range(0, max(samples.size, 1), max(step, 1))
    ]
