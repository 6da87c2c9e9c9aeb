"""Jacobians of every sample, layer by layer: written where they belong, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jacfunc._blocks import stack
from jacfunc._chunks import Chunk, in_chunks
from jacfunc._factors import Factors
from jacfunc._sinks import Grid, Sink
from jacfunc._types import Leaves

SHARE, LEAST, MOST = 16, 5 * 2**20, 2**24
"""Cotangents that are swept at once, unless told otherwise: a sixteenth of the result's bytes, but
so many that they are worth a sweep, and so few that their memory is that of the piece before. More
would be asked for anew, page by page, in every call."""


@dataclass
class LayerByLayer:
    """Chunks of samples, written into the places that the sink gives.

    Args:
        factors_of: an evaluation of the samples from start to stop.
        grid: sizes of a sample's leaves, once one has been seen.
    """

    factors_of: Callable[[int, int], Factors]
    sink: Sink
    grid: Callable[[], Grid]
    places: Leaves | None = None

    def leaves(self, total: int, samples: Chunk, rows: Chunk) -> Leaves:
        """Blocks ``[B, *out, *param]`` row by row, outputs and extras of all samples."""

        def take(start: int, stop: int) -> Leaves:
            factors = self.factors_of(start, stop)
            beside = (*factors.outputs, *factors.linearization.extras)
            if factors.carries_graph:
                return (*self._blocks(factors), *beside)
            self._write(factors, start, total, rows)
            return beside

        found = stack(in_chunks(total, samples, take), total)
        return found if self.places is None else (*self.places, *found)

    def _blocks(self, factors: Factors) -> Leaves:
        """New tensors, which carry a graph."""
        rows = factors.rows(0, sum(self.grid().rows))
        parts = [block.split(self.grid().rows, 1) for block in rows]
        return tuple(
            parts[j][i].unflatten(1, out.shape) if out.dim() else parts[j][i].squeeze(1)
            for i, out in enumerate(factors.of_one)
            for j in range(len(rows))
        )

    def _write(self, factors: Factors, start: int, total: int, chunk: Chunk) -> None:
        """Into the samples from ``start`` on."""
        outputs, grid = factors.of_one, self.grid()
        if self.places is None:
            like = tuple(_like(out, param) for out in outputs for param in factors.params)
            self.places = self.sink.places(like, total, grid)
        params, size, first = factors.params, factors.samples.size, 0
        for i, rows in enumerate(grid.rows):
            places = self.places[i * len(params) : (i + 1) * len(params)]
            blocks = [
                place[start : start + size].view(size, rows, *param.shape)
                for place, param in zip(places, params, strict=True)
            ]
            step = chunk or _piece(rows, factors.nbytes, sum(x.nbytes for x in self.places))
            for _ in in_chunks(rows, step, partial(_fill, factors, blocks, first)):
                pass
            first += rows


def _fill(factors: Factors, blocks: Sequence[Tensor], first: int, start: int, stop: int) -> Leaves:
    """Some rows of an output, of which ``first`` come before it."""
    places = tuple(block[:, start:stop] for block in blocks)
    factors.write_rows(first + start, first + stop, places)
    return ()


def _piece(rows: int, bytes_of_one: int, result: int) -> int:
    """Rows of a piece, where all pieces are as large."""
    at_once = min(max(result // SHARE, LEAST), MOST)
    pieces = -(-rows * bytes_of_one // at_once)
    return -(-rows // max(1, pieces))


def _like(out: Tensor, param: Tensor) -> Tensor:
    """A block of one sample, without memory."""
    dtype = torch.promote_types(out.dtype, param.dtype)
    return out.new_empty((), dtype=dtype).expand(1, *out.shape, *param.shape)
