"""A sink that keeps the diagonal of a Jacobian alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from jacfunc._assembly.basis import numel
from jacfunc._assembly.sinks import Grid, Sink, Sweep
from jacfunc._errors import Nameless
from jacfunc._memory import Chunk
from jacfunc._types import Blocks, Leaves


class DiagonalSink(Sink):
    """Keeps ``J[*lead, *in, *in]`` where its last two indices are equal: ``[*lead, *in]``.

    Its result is one row of tensors ``[*lead, *in_j]``, one for each output, which is the diagonal
    by input leaf ``j``: the inputs take their turns among the outputs.

    Args:
        has_lead: are there dimensions in front? If not, outputs must have the shapes of the inputs.
    """

    allocates = False
    copies = True  # what a sweep returns is not the result

    def __init__(self, has_lead: bool = False) -> None:
        super().__init__()
        self._has_lead = has_lead
        self._blocks: Blocks | None = None

    def at_once(self, chunk: Chunk) -> Chunk:
        return chunk

    def rows(self, sweep: Sweep, chunk: Chunk, outputs: Leaves, primals: Leaves) -> Blocks:
        """From chunks of rows, each of one output leaf."""
        self._check(outputs, primals)
        counts = [out.numel() for out in outputs]
        parts: list[list[Tensor]] = [[] for _ in outputs]
        number = start = 0
        for products in sweep(chunk):
            while number < len(counts) and start == counts[number]:
                number, start = number + 1, 0
            if number == len(counts):
                break
            part = _of_rows(products[number % len(primals)], start)
            parts[number].append(part)
            start += len(part)
        return self._kept(parts, outputs)

    def columns(
        self, sweep: Sweep, chunk: Chunk, outputs: Callable[[], Leaves], primals: Leaves
    ) -> Blocks:
        """From chunks of columns, which may be of several input leaves."""
        chunks, start = sweep(chunk), 0
        parts: list[list[Tensor]] = []
        for products in chunks:
            self._check(outputs(), primals)
            parts = parts or [[] for _ in products]
            for number, product in enumerate(products):
                j = number % len(primals)
                first = numel(primals[:j])
                parts[number] += _of_columns(product, start - first, primals[j])
            start += len(products[0]) if products else 0
        return self._kept(parts, outputs())

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The diagonals; taken from the blocks of a strategy that hands its products to no sink."""
        if self._blocks is None:
            self._blocks = (tuple(map(_of_block, blocks, range(len(blocks)))),)
        return self._blocks

    def _kept(self, parts: Sequence[Sequence[Tensor]], outputs: Leaves) -> Blocks:
        pairs = zip(parts, outputs, strict=True)
        diagonals = [
            (_joined(part) if part else out.new_empty(0)).reshape(out.shape) for part, out in pairs
        ]
        self._blocks = (tuple(diagonals),)
        return self._blocks

    def _check(self, outputs: Leaves, primals: Leaves) -> None:
        if not self._has_lead:
            check_square([out.shape for out in outputs], [primal.shape for primal in primals])


def check_square(outputs: Sequence[torch.Size], primals: Sequence[torch.Size]) -> None:
    """Refuse outputs that do not have the shapes of the inputs.

    Raises:
        Nameless: if they do not.
    """
    if [*outputs] != [*primals]:
        raise Nameless(
            "func must return tensors of the shapes that it is differentiated by, "
            f"{[*map(tuple, primals)]}, got {[*map(tuple, outputs)]}. Reshape them, or choose "
            "another argnums."
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a diagonal in a row; of one alone, as under vmap torch.cat would fix sizes."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], -1)


def _of_block(row: Sequence[Tensor], number: int) -> Tensor:
    """The diagonal of the block on the diagonal of all blocks, which must be a square."""
    block = row[number % len(row)]
    half = block.dim() // 2
    check_square([block.shape[:half]], [block.shape[half:]])
    size = block.shape[:half].numel()
    return block.reshape(size, size).diagonal().reshape(block.shape[:half])


def _of_rows(rows: Tensor, start: int) -> Tensor:
    """The entries on the diagonal of rows ``[K, *in]``, numbered from ``start`` on."""
    flat = rows.reshape(len(rows), -1)
    numbers = torch.arange(len(rows), device=rows.device)
    return flat[numbers, (numbers + start) % flat.shape[1]]


def _of_columns(columns: Tensor, start: int, primal: Tensor) -> Iterator[Tensor]:
    """The entries on the diagonal of columns ``[K, *lead, *in]``, numbered from ``start`` on.

    The numbers count from the first column of this input; columns of other inputs give nothing.
    """
    size, stop = primal.numel(), start + len(columns)
    low, high = max(start, 0), min(stop, size)
    if low < high:
        flat = columns[low - start : high - start].reshape(high - low, -1, size)
        # a copy, as a view would keep all columns
        yield flat[:, :, low:high].diagonal(dim1=0, dim2=2).clone()
