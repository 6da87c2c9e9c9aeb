"""Rows of evaluated batches, written where they belong in the result, without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._assembly import Grid, Sink, shared_units, stack
from jacfunc._factored import FactoredJacobian, LearnedUses
from jacfunc._memory import (
    LEAST_SWEPT_BYTES,
    MOST_SWEPT_BYTES,
    Chunk,
    evenly,
    give_back,
    in_chunks,
    mapped,
)
from jacfunc._samples.call import SampledCall
from jacfunc._samples.one import OneSample, first_again
from jacfunc._types import Leaves

SWEPT_SHARE = 3
"""The bytes of cotangents that are swept at once are a third of the result's, within limits: of a
smaller part there are more sweeps, each of which takes milliseconds whatever it sweeps."""


def is_new(batch: SampledCall) -> bool:
    """Has no call of this kind shown anything yet?"""
    return not (batch.learned_as_a_whole.lessons or LearnedUses.of(batch.kind).refused)


@dataclass
class SampleWriter:
    """Writes blocks of samples, a chunk at a time, into the places that the sink gives.

    Args:
        one: takes the call that was made, with its trees.
        places: tensors for all blocks; allocated after the first evaluation.
        most_swept: bytes of cotangents that are swept at once, at most.
    """

    batch: SampledCall
    sink: Sink
    one: OneSample
    places: Leaves | None = None
    most_swept: int = MOST_SWEPT_BYTES
    is_swept_at_once: bool = False
    """Were all rows of all samples swept at once?"""

    def leaves(self, samples: Chunk, rows: Chunk) -> Leaves:
        """Blocks ``[B, *out, *in]``, outputs and extras of all samples, one after the other."""
        total, is_first = self.batch.size, is_new(self.batch)

        def take(start: int, stop: int) -> Leaves:
            factors, call = self.batch.factors(start, stop)
            self.one.take_call(call, factors.sample_outputs, factors.params)
            beside = (*factors.outputs, *factors.extras)
            grid = self.one.grid()
            is_every = factors.size == total
            self.is_swept_at_once = is_every and self._takes_every_row(factors, grid, rows)
            if factors.carries_graph or self._are_blocks(factors, grid):
                return (*self._blocks(factors), *beside)
            self._write(factors, grid, start, rows, is_first)
            return beside

        def again(size: int) -> Leaves:
            return self.batch.factors(0, size)[0].outputs

        def outputs_of(leaves: Leaves) -> Leaves:
            count = len(self.one.grid().rows)
            start = 0 if self.places is not None else count * len(self.one.grid().columns)
            return leaves[start : start + count]

        chunks = first_again(in_chunks(total, samples, take), total, outputs_of, again)
        leaves = stack(chunks, total)
        return leaves if self.places is None else (*self.places, *leaves)

    def _blocks(self, factors: FactoredJacobian) -> Leaves:
        """Blocks as new tensors, each of one sweep."""
        return tuple(
            block.unflatten(1, out.shape) if out.dim() else block.squeeze(1)
            for number, out in enumerate(factors.sample_outputs)
            for block in factors.rows(0, out.numel(), number)
        )

    def _are_blocks(self, factors: FactoredJacobian, grid: Grid) -> bool:
        """Are the products of one sweep the blocks of an output leaf, so that none is copied?"""
        if self.sink.copies or not (self.is_swept_at_once and factors.is_direct):
            return False
        if factors.size == 1:  # its products may be the seeds themselves, which other sweeps use
            return False
        return all(x.dtype == grid.dtype for x in (*factors.outputs, *factors.params))

    def _takes_every_row(self, factors: FactoredJacobian, grid: Grid, chunk: Chunk) -> bool:
        return all(self._at_once(factors, grid, rows, chunk) == rows for rows in grid.rows)

    def _at_once(self, factors: FactoredJacobian, grid: Grid, rows: int, chunk: Chunk) -> Chunk:
        """How many of so many rows are swept at once, by default within limits."""
        if chunk:
            return chunk
        result = self.batch.size * sum(grid.rows) * sum(grid.columns) * grid.dtype.itemsize
        most = min(max(result // SWEPT_SHARE, LEAST_SWEPT_BYTES), self.most_swept)
        return evenly(rows, factors.nbytes, most)

    def _write(
        self, factors: FactoredJacobian, grid: Grid, start: int, chunk: Chunk, is_first: bool
    ) -> None:
        """Write the blocks of samples, of which the first has the number ``start``.

        In the first call of a kind the heap is in pieces. What is free there is given back before
        a sweep, whose blocks have pages of their own: they would find room beside the pieces alone.
        That takes a while, which only the first call has.
        """
        total = self.batch.size
        samples = slice(start, start + factors.size)
        for number, rows in enumerate(grid.rows):

            def fill(begin: int, end: int, number: int = number) -> Leaves:
                if is_first:
                    give_back()
                of = slice(number, number + 1)
                units = shared_units(factors.outputs[of], begin, end)

                def blocks() -> Leaves:
                    places = self._places(factors, grid, number)
                    if (factors.size, end - begin) == (total, grid.rows[number]):
                        return places
                    return tuple(place[samples, begin:end] for place in places)

                factors.write_rows(units, blocks, of)
                return ()

            with mapped() if is_first else nullcontext():
                for _ in in_chunks(rows, self._at_once(factors, grid, rows, chunk), fill):
                    pass

    def _places(self, factors: FactoredJacobian, grid: Grid, number: int) -> Leaves:
        """Places for the blocks of an output, ``[B, M, *param]``."""
        params, total = factors.params, self.batch.size
        if self.places is None:
            like = tuple(x for out in factors.sample_outputs for x in _like(out, params))
            self.places = self.sink.places(like, total, grid)
        places = self.places[number * len(params) : (number + 1) * len(params)]
        return tuple(
            place.view(total, grid.rows[number], *param.shape)
            for place, param in zip(places, params, strict=True)
        )


def _like(out: Tensor, params: Leaves) -> Iterator[Tensor]:
    """Tensors like the blocks of one sample, which take no memory."""
    numbers: dict[torch.dtype, Tensor] = {}
    for param in params:
        dtype = torch.promote_types(out.dtype, param.dtype)
        if dtype not in numbers:
            numbers[dtype] = out.new_empty((), dtype=dtype)
        yield numbers[dtype].expand(1, *out.shape, *param.shape)
