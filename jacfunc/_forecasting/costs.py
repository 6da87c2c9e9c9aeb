"""Forecasts of seconds and bytes by strategy, from the operations of one recorded evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jacfunc._assembly import numel
from jacfunc._forecasting.machine import LARGEST, MANY_COLUMNS, SPACIOUS, Cost, Machine
from jacfunc._forecasting.machines import machine
from jacfunc._forecasting.recording import Operation, Recorder, Unrecordable
from jacfunc._linear_map import JacobianOperator
from jacfunc._measuring import is_here
from jacfunc._memory import LARGE, evenly, largest
from jacfunc._torch import below_transforms, is_pushing, uncompiled
from jacfunc._types import Leaves, product_dtype
from jacfunc.strategies import Sweeping

LOOKING = 3.0
"""To look for uses of parameters takes the overhead of this many plain evaluations."""


@dataclass(frozen=True)
class Costs:
    """What each strategy would cost for one function at one point.

    In a sweep every operation costs its overhead once and, for each seed of a chunk, its products
    and the bytes that these write, at the machine's speed for results of that size.

    Args:
        operations: operations of the evaluation that depend on the primals.
        rows, columns: how many numbers the outputs and the inputs hold.
        blocks: bytes of each block of the Jacobian, or of the single matrix that holds all blocks.
        outputs: bytes of the outputs.
        kept: bytes that an evaluation keeps for pullbacks, with the outputs.
        speeds: how fast the machine is, in the dtype of the outputs.
        is_copied: are products copied into the result? A strategy by layers writes there at once.
        of_products: how fast it multiplies factors of layers, if in another dtype.
    """

    operations: Sequence[Operation]
    rows: int
    columns: int
    blocks: Sequence[int]
    outputs: int
    kept: int
    speeds: Machine
    is_copied: bool = False
    of_products: Machine | None = None

    @classmethod
    def of(cls, operator: JacobianOperator, recorder: Recorder) -> Costs | None:
        """Costs for all samples of the vmaps outside; None of a device that is not of this machine,
        or where there is nothing to sweep.
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
            of_products=machine(outputs[0].device, product_dtype(outputs[0])),
        )

    @classmethod
    def of_graph(cls, outputs: Leaves, primals: Leaves, swept: int) -> Costs:
        """Costs of pulling back through a graph that was there before, of which bytes are known.

        Args:
            swept: bytes of the cotangents between primals and outputs, for one seed.
        """
        pairs = [(out, primal) for out in outputs for primal in primals]
        return cls(
            [Operation(read=swept, written=swept)],
            numel(outputs),
            numel(primals),
            [
                out.numel() * primal.numel() * torch.promote_types(out.dtype, primal.dtype).itemsize
                for out, primal in pairs
            ],
            sum(out.nbytes for out in outputs),
            0,
            machine(outputs[0].device, outputs[0].dtype),
        )

    @property
    def result(self) -> int:
        """Bytes of the Jacobian."""
        return sum(self.blocks)

    @property
    def widest(self) -> int:
        """Bytes of the largest cotangent between primals and outputs, for one seed."""
        return max((op.read - op.primal_bytes for op in self.operations), default=0)

    @property
    def reuses_pages(self) -> bool:
        """Is most of the result large blocks, so that writing into freed pages saves time?

        Smaller blocks are written there, too, but as products of other strategies they mostly find
        memory in the heap again: layers gain nothing over these.
        """
        return self.is_copied or 2 * sum(x for x in self.blocks if x >= LARGE) >= self.result

    def times(self, batch: int, is_copied: bool = False) -> Costs:
        """Costs of the function under vmap over a batch: as many operations, each of more bytes."""
        return replace(
            self,
            operations=[op.times(batch) for op in self.operations],
            blocks=[batch * size for size in ([self.result] if is_copied else self.blocks)],
            outputs=self.outputs * batch,
            kept=self.kept * batch,
            is_copied=is_copied,
        )

    def seeds(self, strategy: Sweeping) -> int:
        """How many seeds the strategy sweeps in all."""
        return self.columns if strategy.sweeps.are_pushes else self.rows

    def seed_bytes(self, strategy: Sweeping) -> int:
        """A bound of the bytes that a seed takes in a sweep, as if nothing were freed meanwhile."""
        moved = sum(op.read + op.written for op in self.operations)
        if strategy.sweeps.by_layers:  # no gradient of a parameter is ever there
            moved -= sum(op.primal_bytes for op in self.operations)
        return 2 * moved

    def most_bytes(self, strategy: Sweeping) -> int:
        """A bound of the bytes of a sweep of all seeds."""
        results = 1 if strategy.sweeps.by_layers else 2
        swept = self.seeds(strategy) * self.seed_bytes(strategy)
        return self.kept + results * self.result + swept

    def least_bytes(self, strategy: Sweeping) -> int:
        """Bytes that a sweep takes at least: products of the largest operation with its seeds."""
        sweeps = strategy.sweeps
        if sweeps.are_pushes:
            sizes = [op.written for op in self.operations]
        else:  # by layers, gradients of parameters are not swept
            sizes = [op.read - op.primal_bytes * sweeps.by_layers for op in self.operations]
        return largest(sweeps.chunk_size, self.seeds(strategy)) * max(sizes, default=0)

    def most_seeds(self, strategy: Sweeping) -> int:
        """The size of even chunks of which no block of memory is larger than the heap keeps."""
        pushes, block = strategy.sweeps.are_pushes, self.speeds.block
        made = max((op.made(block, pushes) for op in self.operations), default=0)
        return evenly(self.seeds(strategy), made, LARGEST)

    @property
    def most_loops(self) -> int:
        """Of more seeds a loop is never faster: one, or more where torch pulls few back slowly."""
        return MANY_COLUMNS if any(op.by_vector for op in self.operations) else 1

    def seconds(self, strategy: Sweeping) -> float:
        """Seconds of all sweeps of the strategy, and of the evaluations that they need."""
        sweeps, total = strategy.sweeps, self.seeds(strategy)
        if sweeps.by_layers:
            return self._by_layers()
        chunk = largest(sweeps.chunk_size, total)
        count = -(-total // chunk)
        copies = self._write_blocks() if count > 1 or self.is_copied else 0.0
        if sweeps.are_pushes:
            cost = self.speeds.push_batch if sweeps.is_vmapped else self.speeds.push
            return count * self._push(chunk, cost) + copies
        return self.evaluation() + count * self._pull(chunk, count) + copies

    def _by_layers(self) -> float:
        """Seconds by layers: all operations are looked at; no gradients are made but the result."""
        overhead = LOOKING * self.speeds.evaluate.seconds(len(self.operations))
        passing = [op.without_primals() for op in self.operations]
        # convolutions are unfolded, and are matrix products then
        flops = self.rows * sum(op.primal_flops for op in self.operations)
        products = flops * (self.of_products or self.speeds).flop(self.rows, False, False)
        pulled = replace(self, operations=passing)._pull(self.rows)
        return overhead + self.evaluation() + pulled + products + self._write_blocks()

    def least_push(self) -> float:
        """Seconds that forward mode takes at least, by a rule of thumb instead of a measurement.

        Torch takes a second to set forward mode up, which the measurement would pay.
        """
        return 2 * self.speeds.pull_batch.seconds(len(self.operations))

    def evaluation(self) -> float:
        """Seconds of an evaluation that keeps its graph."""
        return self.speeds.evaluate.seconds(len(self.operations)) + sum(
            self.speeds.multiply(op, 1, True) + self._write(op.written) for op in self.operations
        )

    def _pull(self, seeds: int, sweeps: int = 1) -> float:
        if seeds > 1:
            cost = self.speeds.pull_batch
        else:
            cost = self.speeds.pull if sweeps == 1 else self.speeds.pull_each
        return cost.seconds(len(self.operations)) + sum(
            seeds * self.speeds.multiply(op, seeds, False)
            + self._write(seeds * op.read, seeds * min(op.widest, op.read))
            for op in self.operations
        )

    def _push(self, seeds: int, cost: Cost) -> float:
        """Seconds of a pushforward, which evaluates the function as well."""
        overhead = cost.seconds(len(self.operations))
        if scaled := sum(op.is_scaled for op in self.operations):
            overhead += scaled * self.speeds.scaling
        return overhead + sum(
            (seeds + 1) * self.speeds.multiply(op, seeds, True) + self._write(seeds * op.written)
            for op in self.operations
        )

    def _write_blocks(self) -> float:
        """Seconds to copy all blocks into the result; large blocks go into freed pages.

        What smaller ones cost is what is taken of products of their size: strategies are compared.
        """
        write = self.speeds.write
        return sum(x * write(SPACIOUS if x >= LARGE else x) for x in self.blocks if x)

    def _write(self, size: int, widest: int = 0) -> float:
        # a cotangent for each argument, the widest of them so large, has memory of its own
        return size * self.speeds.write(widest or size) if size else 0.0


def _copies(tensor: torch.Tensor) -> int:
    """How many samples of a tensor the vmaps outside hold."""
    return below_transforms(tensor).numel() // max(tensor.numel(), 1)


def counted_costs(operator: JacobianOperator) -> Costs | None:
    """Costs from an evaluation that is recorded; None where there is nothing to forecast from."""
    operator.rewind_generators()
    if is_pushing():  # torch has one level of forward mode: no machine can be measured inside it
        return None
    try:
        with uncompiled(), Recorder(operator.primals) as recorder:
            operator.outputs  # noqa: B018 (evaluates)
    except Unrecordable:
        operator.rewind_generators()
        return None
    return Costs.of(operator, recorder)
