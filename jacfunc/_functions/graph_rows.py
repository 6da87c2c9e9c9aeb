"""Rows of a Jacobian that are pulled back through a graph which was there before the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from jacfunc._assembly import NEW_TENSORS, Grid, Sink, numel, unit_seeds
from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._forecasting import Costs
from jacfunc._linear_map import EVERY, Anchor, Linearization, Paths, map_of_graph
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._memory import Chunk, FittedChunks, in_chunks, of_leaf
from jacfunc._planning import Auto, Plan, bounded
from jacfunc._types import Blocks, Leaves
from jacfunc.strategies import Looped, Reverse, Strategy

API = "graph_jacobian"

MOST_ALONE = 3
"""Up to this many rows are swept one by one under auto: a vmap takes longer than it saves."""


@dataclass
class GraphRows:
    """The Jacobian of outputs by inputs, row by row, from the graph between them.

    Args:
        paths: what lies between the two.
        create_graph: are rows differentiable?
        retaining: tensors whose ``.grad`` a sweep would write, as they retain their gradients.
        frees: does the last sweep free the graph?
    """

    outputs: Leaves
    inputs: Leaves
    paths: Paths
    create_graph: bool = False
    frees: bool = False
    retaining: Leaves = ()
    _is_free: bool = field(default=False, init=False)

    def blocks(self, sink: Sink, chunk: Chunk) -> Blocks:
        """Finished blocks ``[*out, *in]``."""
        blocks = sink.rows(self.sweep, chunk, self.outputs, self.inputs)
        self._free()
        return sink.finished(blocks, Grid.of(self.outputs, self.inputs), ())

    def sample_blocks(self, sink: Sink, chunk: Chunk, size: int) -> Blocks:
        """Finished blocks ``[B, *out, *in]`` of inputs ``[B, *in]``; the outputs are sums over B.

        The derivative of a sum by the inputs of a sample is that of the sample's own outputs, as
        all others do not depend on these inputs.
        """
        inputs = self.inputs
        grid = replace(
            Grid.of(self.outputs, inputs), columns=[leaf.shape[1:].numel() for leaf in inputs]
        )
        if self.create_graph:
            rows = NEW_TENSORS.rows(self.sweep, chunk, self.outputs, inputs)
            pairs = zip(rows, self.outputs, strict=True)
            blocks = tuple(tuple(x.movedim(out.dim(), 0) for x in row) for row, out in pairs)
        else:
            likes = tuple([_like(out, leaf) for out in self.outputs for leaf in inputs])
            places, width = sink.places(likes, size, grid), len(inputs)
            count = range(len(self.outputs))
            blocks = tuple(places[n * width : (n + 1) * width] for n in count)
            self._write(blocks, chunk)
        self._free()
        return sink.finished(blocks, grid, (size,))

    def _write(self, blocks: Blocks, chunk: Chunk) -> None:
        """Write the rows of all samples into blocks ``[B, *out, *in]``."""
        for number, (places, out) in enumerate(zip(blocks, self.outputs, strict=True)):
            start = 0
            for rows in self._rows_of(number, chunk):
                stop = start + len(rows[0])
                for place, row in zip(places, rows, strict=True):
                    size, shape = row.shape[1], row.shape[2:]
                    place.view(size, out.numel(), *shape)[:, start:stop] = row.transpose(0, 1)
                start = stop
                del rows, row  # or they would stay beside the next chunk

    def sweep(self, chunk: Chunk) -> Iterator[Leaves]:
        """All rows ``[K, *in]``, in chunks that hold rows of one output leaf each."""
        for number in range(len(self.outputs)):
            yield from self._rows_of(number, chunk)

    def _rows_of(self, number: int, chunk: Chunk) -> Iterator[Leaves]:
        """The rows of one output leaf."""
        yield from in_chunks(
            self.outputs[number].numel(), of_leaf(chunk, number), partial(self._rows, number)
        )

    def _rows(self, number: int, start: int, stop: int) -> Leaves:
        out = self.outputs[number]
        if start == stop:
            return tuple([leaf.new_empty((0, *leaf.shape)) for leaf in self.inputs])
        seeds, of = unit_seeds((out,), start, stop), slice(number, number + 1)
        if stop - start > 1:
            rows = self._pulled(lambda u: self._linearization.pull_batch(u, EVERY, of), seeds)
        else:
            is_last = number == self._last and stop == out.numel()
            frees = is_last and self.frees
            pull = self._freeing(of) if frees else self._linearization.sweep(EVERY, of)
            rows = tuple([row.unsqueeze(0) for row in self._pulled(pull, (seeds[0][0],))])
        return tuple([row if row.layout == torch.strided else row.to_dense() for row in rows])

    def _freeing(self, of: slice) -> Callable[[Leaves], Leaves]:
        """Pulls one cotangent back, for the last time.

        It is not under vmap: a sweep that fails there is repeated row by row, for which the graph
        must still be there.
        """
        self._is_free = True
        assert self._linearization.last is not None
        return self._linearization.last(EVERY, of)

    def _free(self) -> None:
        """Free the graph, unless the last row has done so."""
        if self.frees and not self._is_free:
            self._pulled(self._freeing(EVERY), tuple(map(torch.zeros_like, self.outputs)))

    def _pulled(self, pull: Callable[[Leaves], Leaves], cotangents: Leaves) -> Leaves:
        """What ``pull`` returns; a ``.grad`` that it writes is as before."""
        grads = [leaf.grad for leaf in self.retaining]
        try:
            return pull(cotangents)
        except Exception as error:  # hooks and backward passes of the user's may raise anything
            if isinstance(error, Refused) or is_out_of_memory(error):
                raise
            raise _in_words(error) from error
        finally:
            for leaf, grad in zip(self.retaining, grads, strict=True):
                leaf.grad = grad

    @kept_property
    def _last(self) -> int:
        """The number of the last output leaf that has a row."""
        return max((n for n, out in enumerate(self.outputs) if out.numel()), default=-1)

    @kept_property
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
            size = reverse.chunk_size
            # how many rows fitted in sweeps of another graph says nothing about this one
            return size.anew() if isinstance(size, FittedChunks) else size
        few = reverse.chunk_size is None and numel(self.outputs) <= MOST_ALONE
        if few and chosen.memory is None:
            return 1
        costs = Costs.of_graph(self.outputs, self.inputs, self.paths.nbytes)
        plan = bounded(Plan(reverse, f"{costs.rows} rows of a graph"), costs, chosen.memory)
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
    if "escaped from inside a function being vmapped" in told:
        return ValueError(
            f"{API}: tensors between inputs and outputs must not retain their gradients, got one "
            "that does. Call retain_grad() on it afterwards, or pass strategy='looped'."
        )
    return Refused(f"torch can't pull cotangents back through it ({told})")
