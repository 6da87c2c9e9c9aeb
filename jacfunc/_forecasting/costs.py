"""Seconds and bytes that a strategy would take, from the operations of one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jacfunc._assembly import numel
from jacfunc._forecasting.machine import LARGEST, Cost, Machine, machine
from jacfunc._forecasting.recording import Operation, Recorder, Unrecordable
from jacfunc._linear_map import JacobianOperator
from jacfunc._measuring import is_here
from jacfunc._memory import LARGE, largest
from jacfunc._torch import below_transforms, is_pushing, uncompiled
from jacfunc.strategies import Forward, Looped, Reverse, Strategy, Structured

COLUMN_LOOP = Looped("columns")

LOOKING = 8.0
"""Evaluations of overhead alone that it takes to look for the uses of parameters."""


def is_forward(strategy: Strategy) -> bool:
    """Does it push tangents?"""
    return isinstance(strategy, Forward) or strategy == COLUMN_LOOP


@dataclass(frozen=True)
class Costs:
    """Of one function at one point.

    Every operation costs a sweep its own overhead once, and for each seed of a chunk its products
    and the bytes that they write, at the speed of results of that size.

    Args:
        operations: those of an evaluation that depend on the primals.
        rows, columns: outputs and inputs.
        blocks: bytes of each block of the Jacobian, or of the one matrix that they are put into.
        outputs: bytes of the outputs.
        kept: bytes that an evaluation leaves behind for pullbacks, the outputs among them.
        speeds: of the machine.
        is_copied: the result is put together elsewhere, which only layers write into at once.
    """

    operations: Sequence[Operation]
    rows: int
    columns: int
    blocks: Sequence[int]
    outputs: int
    kept: int
    speeds: Machine
    is_copied: bool = False

    @classmethod
    def of(cls, operator: JacobianOperator, recorder: Recorder) -> Costs | None:
        """Of an operator whose evaluation has been recorded; the vmaps outside are counted in.

        None where there is nothing to sweep, or the device is not of this machine.
        """
        outputs, primals = operator.outputs, operator.primals
        if not numel(outputs) or not numel(primals) or not is_here(outputs[0].device):
            return None
        dtype = torch.promote_types(outputs[0].dtype, primals[0].dtype)
        copies = max(max(map(_copies, outputs)), max(map(_copies, primals)))
        size = copies * dtype.itemsize
        speeds = machine(outputs[0].device, outputs[0].dtype)
        return cls(
            recorder.operations,
            numel(outputs),
            numel(primals),
            [size * out.numel() * primal.numel() for out in outputs for primal in primals],
            sum(below_transforms(out).nbytes for out in outputs),
            recorder.live,
            speeds,
        )

    @property
    def result(self) -> int:
        """Bytes of the Jacobian."""
        return sum(self.blocks)

    @property
    def widest(self) -> int:
        """Bytes of one cotangent where they are most, the primals' own left out."""
        return max((op.read - op.held for op in self.operations), default=0)

    @property
    def reuses_pages(self) -> bool:
        """Is it sure that whoever writes into places of their own saves by it?"""
        return self.is_copied or 2 * sum(x for x in self.blocks if x >= LARGE) >= self.result

    def times(self, batch: int, is_copied: bool = False) -> Costs:
        """The same vmapped over a batch: more bytes and products, no more operations."""
        scaled = [
            replace(
                op,
                read=op.read * batch,
                written=op.written * batch,
                flops=op.flops * batch,
                held=op.held * batch,
                held_flops=op.held_flops * batch,
            )
            for op in self.operations
        ]
        return replace(
            self,
            operations=scaled,
            blocks=[batch * size for size in ([self.result] if is_copied else self.blocks)],
            outputs=self.outputs * batch,
            kept=self.kept * batch,
            is_copied=is_copied,
        )

    def seeds(self, strategy: Reverse | Forward | Looped | Structured) -> int:
        """How many the strategy sweeps in all."""
        return self.columns if is_forward(strategy) else self.rows

    def most_bytes(self, strategy: Reverse | Forward | Structured) -> int:
        """At most that, swept in one chunk: as if nothing were freed before the end."""
        moved = sum(op.read + op.written for op in self.operations)
        results = 2
        if isinstance(strategy, Structured):  # no gradient of a parameter is ever there
            moved, results = moved - sum(op.held for op in self.operations), 1
        return self.kept + results * self.result + 2 * self.seeds(strategy) * moved

    def least_bytes(self, strategy: Reverse | Forward | Structured) -> int:
        """Bytes that a sweep takes at least: products of the largest operation with its seeds."""
        if is_forward(strategy):
            sizes = [op.written for op in self.operations]
        elif isinstance(strategy, Structured):  # gradients of parameters are not swept
            sizes = [op.read - op.held for op in self.operations]
        else:
            sizes = [op.read for op in self.operations]
        return largest(strategy.chunk_size, self.seeds(strategy)) * max(sizes, default=0)

    def seconds(self, strategy: Reverse | Forward | Looped | Structured) -> float:
        """All sweeps of the strategy, and the evaluations that they need."""
        if isinstance(strategy, Structured):
            return self._by_layers()
        total = self.seeds(strategy)
        is_looped = isinstance(strategy, Looped)
        chunk = 1 if isinstance(strategy, Looped) else largest(strategy.chunk_size, total)
        sweeps = -(-total // chunk)
        copies = self._write_blocks() if sweeps > 1 or self.is_copied else 0.0
        if is_forward(strategy):
            cost = self.speeds.push if is_looped else self.speeds.push_batch
            return sweeps * self._push(chunk, cost) + copies
        return self._evaluation() + sweeps * self._pull(chunk) + copies

    def _by_layers(self) -> float:
        """Every operation is looked at; no gradient of a parameter is made but the result."""
        overhead = LOOKING * self.speeds.evaluate.seconds(len(self.operations))
        passing = [
            replace(op, read=op.read - op.held, flops=op.flops - op.held_flops)
            for op in self.operations
        ]
        # convolutions are unfolded, and are matrix products then
        flops = self.rows * sum(op.held_flops for op in self.operations)
        products = flops * self.speeds.flop(self.rows, False, False)
        pulled = replace(self, operations=passing)._pull(self.rows)
        return overhead + self._evaluation() + pulled + products + self._write_blocks()

    def least_push(self) -> float:
        """Forward mode takes at least that, wherever it was measured; this asks no machine for it.

        To measure it takes torch a second where nobody has used it yet.
        """
        return 2 * self.speeds.pull_batch.seconds(len(self.operations))

    def _evaluation(self) -> float:
        return self.speeds.evaluate.seconds(len(self.operations)) + sum(
            self._multiply(op, 1, True) + self._write(op.written) for op in self.operations
        )

    def _pull(self, seeds: int) -> float:
        cost = self.speeds.pull if seeds == 1 else self.speeds.pull_batch
        return cost.seconds(len(self.operations)) + sum(
            seeds * self._multiply(op, seeds, False) + self._write(seeds * op.read)
            for op in self.operations
        )

    def _push(self, seeds: int, cost: Cost) -> float:
        """The evaluation rides along."""
        scaled = sum(op.is_scaled for op in self.operations)
        overhead = scaled * self.speeds.scaling if scaled else 0.0
        return (
            overhead
            + cost.seconds(len(self.operations))
            + sum(
                (seeds + 1) * self._multiply(op, seeds, True) + self._write(seeds * op.written)
                for op in self.operations
            )
        )

    def _multiply(self, op: Operation, seeds: int, forward: bool) -> float:
        return op.flops * self.speeds.flop(seeds, op.is_conv, forward) if op.flops else 0.0

    def _write_blocks(self) -> float:
        """Into places of their own: large ones in pages that were written before."""
        write = self.speeds.write
        return sum(x * write(LARGEST if x >= LARGE else x) for x in self.blocks if x)

    def _write(self, size: int) -> float:
        return size * self.speeds.write(size) if size else 0.0


def _copies(tensor: torch.Tensor) -> int:
    """How many the vmaps outside make of a tensor."""
    return below_transforms(tensor).numel() // max(tensor.numel(), 1)


def counted_costs(operator: JacobianOperator) -> Costs | None:
    """From a recorded evaluation; None where there is nothing to forecast from."""
    operator.repeat_draws()
    if is_pushing():  # torch has one level of forward mode: no machine can be measured inside it
        return None
    try:
        with uncompiled(), Recorder(operator.primals) as recorder:
            operator.outputs  # noqa: B018 (evaluates)
    except Unrecordable:
        operator.repeat_draws()
        return None
    return Costs.of(operator, recorder)
