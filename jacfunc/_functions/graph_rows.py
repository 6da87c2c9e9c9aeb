"""Rows of a Jacobian that are pulled back through a graph which was there before the call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from jacfunc._assembly import NEW_TENSORS, Grid, Sink, numel, unit_seeds
from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._forecasting import Costs
from jacfunc._linear_map import EVERY, Anchor, Linearization, Paths, map_of_graph
from jacfunc._log import note
from jacfunc._memory import Chunk, in_chunks, of_leaf
from jacfunc._planning import Auto, Plan, bounded
from jacfunc._types import Blocks, Leaves
from jacfunc.strategies import Looped, Reverse, Strategy

API = "graph_jacobian"

MOST_ALONE = 3
"""So many rows are swept one by one under auto: a vmap would take longer than it saves."""


@dataclass(frozen=True)
class GraphRows:
    """The Jacobian of outputs by inputs, row by row, from the graph between them.

    Args:
        paths: what lies between the two.
        create_graph: are rows differentiable?
        frees: does the last row free the graph? It has a sweep of its own, without vmap: a sweep
            that fails under vmap is repeated row by row, and needs the graph again.
    """

    outputs: Leaves
    inputs: Leaves
    paths: Paths
    create_graph: bool = False
    frees: bool = False

    def blocks(self, sink: Sink, chunk: Chunk) -> Blocks:
        """Finished blocks ``[*out, *in]``."""
        blocks = sink.rows(self.sweep, chunk, self.outputs, self.inputs)
        return sink.finished(blocks, Grid.of(self.outputs, self.inputs), ())

    def sample_blocks(self, sink: Sink, chunk: Chunk, size: int) -> Blocks:
        """Finished blocks ``[B, *out, *in]`` of inputs ``[B, *in]``; the outputs are sums over B.

        The derivative of a sum by the inputs of a sample is that of the sample's own outputs, as
        all others do not depend on these inputs.
        """
        outputs, inputs = self.outputs, self.inputs
        grid = replace(Grid.of(outputs, inputs), columns=[x.shape[1:].numel() for x in inputs])
        if self.create_graph:
            rows = NEW_TENSORS.rows(self.sweep, chunk, outputs, inputs)
            pairs = zip(rows, outputs, strict=True)
            blocks = tuple(tuple(x.movedim(out.dim(), 0) for x in row) for row, out in pairs)
            return sink.finished(blocks, grid, (size,))
        likes = tuple([_like(out, leaf) for out in outputs for leaf in inputs])
        every = sink.places(likes, size, grid)
        width = len(inputs)
        blocks = tuple(every[n * width : (n + 1) * width] for n in range(len(outputs)))
        for number, places in enumerate(blocks):
            start = 0
            for chunk_rows in self._rows_of(number, chunk):
                for place, row, leaf in zip(places, chunk_rows, inputs, strict=True):
                    matrix = place.view(size, outputs[number].numel(), *leaf.shape[1:])
                    matrix[:, start : start + len(row)] = row.transpose(0, 1)
                start += len(chunk_rows[0])
        return sink.finished(blocks, grid, (size,))

    def sweep(self, chunk: Chunk) -> Iterator[Leaves]:
        """All rows ``[K, *in]``, in chunks that hold rows of one output leaf each."""
        for number in range(len(self.outputs)):
            yield from self._rows_of(number, chunk)

    def _rows_of(self, number: int, chunk: Chunk) -> Iterator[Leaves]:
        """The rows of one output leaf."""
        frees = self.frees and number == self._last
        count = self.outputs[number].numel() - frees
        if count or not frees:
            yield from in_chunks(count, of_leaf(chunk, number), partial(self._rows, number))
        if frees:
            yield self._rows(number, count, count + 1, is_last=True)

    def _rows(self, number: int, start: int, stop: int, is_last: bool = False) -> Leaves:
        if start == stop:
            return tuple([leaf.new_empty((0, *leaf.shape)) for leaf in self.inputs])
        seeds = unit_seeds((self.outputs[number],), start, stop)
        pull = self._pull_and_free if is_last else self._linearization.pull_batch
        try:
            rows = pull(seeds, EVERY, slice(number, number + 1))
        except Exception as error:  # hooks and backward passes of the user's may raise anything
            if isinstance(error, Refused) or is_out_of_memory(error):
                raise
            raise _in_words(error) from error
        return tuple([row if row.layout == torch.strided else row.to_dense() for row in rows])

    def _pull_and_free(self, seeds: Leaves, onto: slice, of: slice) -> Leaves:
        assert self._linearization.last is not None
        rows = self._linearization.last((seeds[0][0],), onto, of)
        return tuple([row.unsqueeze(0) for row in rows])

    @cached_property
    def _last(self) -> int:
        """The number of the last output leaf that has a row."""
        return max((n for n, out in enumerate(self.outputs) if out.numel()), default=-1)

    @cached_property
    def _linearization(self) -> Linearization:
        anchors = [Anchor.at(leaf) for leaf in self.inputs]
        return map_of_graph(self.outputs, (), anchors, self.paths.graph, self.create_graph)

    def chunk(self, strategy: Strategy) -> Chunk:
        """How many rows a strategy sweeps at once.

        Raises:
            ValueError: if it does anything else than to pull rows back, or if memory is too small.
        """
        chosen = strategy.strategy if isinstance(strategy, Plan) else strategy
        ways = chosen.directions if isinstance(chosen, Auto) else (chosen,)
        if Looped() in ways:
            return 1
        reverse = next((way for way in ways if isinstance(way, Reverse)), None)
        if reverse is None:
            raise ValueError(
                f"{API}: strategy must be one that pulls cotangents back through a graph, got "
                f"{strategy!r}. Pass 'auto', 'reverse' or 'looped'; others evaluate a function, as "
                "jacobian(func) does."
            )
        if not isinstance(chosen, Auto):
            return reverse.chunk_size
        few = reverse.chunk_size is None and numel(self.outputs) <= MOST_ALONE
        if few and chosen.memory is None:
            return 1
        costs = Costs.of_graph(self.outputs, self.inputs, self.paths.nbytes)
        plan = bounded(Plan(reverse, f"{costs.rows} outputs of a graph"), costs, chosen.memory)
        note("%s: %s", plan.strategy, plan.reason)
        assert isinstance(plan.strategy, Reverse)
        return plan.strategy.chunk_size


def _like(out: Tensor, leaf: Tensor) -> Tensor:
    """A tensor like the block of one sample, which takes no memory."""
    dtype = torch.promote_types(out.dtype, leaf.dtype)
    return out.new_empty((), dtype=dtype).expand(1, *out.shape, *leaf.shape[1:])


def _in_words(error: Exception) -> Exception:
    """The error to raise for one of torch's, or of the user's, in a sweep."""
    told = str(error).strip().split("\n")[0]
    if "backward through the graph a second time" in told:
        return ValueError(
            f"{API}: the graph of outputs must be there still, got one that an earlier sweep has "
            "freed. Pass retain_graph=True to that sweep, or make the forward pass again."
        )
    if "modified by an inplace operation" in told:
        what = told.partition("inplace operation: ")[2].partition(". Hint")[0]
        return ValueError(
            f"{API}: tensors that the graph keeps must be as they were in the forward pass, got "
            f"one that was written into since: {what}. Take the Jacobian before the write (of an "
            "optimizer's step, say), or write into a clone."
        )
    return Refused(f"torch can't pull cotangents back through it ({told})")
