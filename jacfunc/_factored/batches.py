"""The two ways to evaluate all samples of a batch: under vmap, or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from jacfunc._arguments import check_plain
from jacfunc._errors import Refused
from jacfunc._factored.factored_jacobian import Direct
from jacfunc._factored.learned import LearnedUses
from jacfunc._layouts import (
    OUT,
    Layout,
    NoLayout,
    Placing,
    PlainSamples,
    Trace,
    VmappedSamples,
)
from jacfunc._linear_map import (
    Anchor,
    Dims,
    SampleFunction,
    Samples,
    differentiable_alias,
    one_sample,
    writable_copy,
)
from jacfunc._torch import innermost, recording
from jacfunc._types import LeafFunction, Leaves

Image: TypeAlias = tuple[Leaves, Leaves]
"""Outputs and extras."""

Record: TypeAlias = Callable[[Placing, Leaves, Callable[[], Image]], Image]
"""``record(placing, handles, evaluate)`` calls ``evaluate`` and records uses of the handles."""


@dataclass(frozen=True)
class VmappedBatch:
    """A function of its primals and one sample, vmapped over all samples.

    Args:
        of_one: the function of the primals and the data of one sample.
        call: the call of one sample.
        primals: parameters, and tensors of all samples.
        own: of each primal that every sample has its own of, by number, the number of its leaf
            among those of the samples.
    """

    of_one: SampleFunction
    call: LeafFunction
    primals: Leaves
    samples: Samples
    own: Mapping[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many samples there are."""
        return self.samples.size

    @property
    def params(self) -> Leaves:
        """The primals as one sample has them."""
        return one_sample(self.primals, [self._dim(n) for n in range(len(self.primals))], 0)

    def tracked(self, learned: LearnedUses) -> Sequence[int]:
        """Numbers of the parameters whose uses are looked for."""
        return [number for number in range(len(self.primals)) if number not in self.own]

    def handle(self, number: int, anchor: Tensor, learned: LearnedUses) -> Tensor:
        """What the function gets as a primal: a copy if it may write into it."""
        if number in self.own:
            return writable_copy(anchor)
        if learned.is_lent(number):
            return anchor.view_as(anchor)
        own = self.samples.each(anchor) if number in learned.others else anchor
        return own if number in learned.others - learned.written else writable_copy(own)

    def direct(self, learned: LearnedUses) -> list[Direct]:
        """The primals that are differentiated as they are."""
        dim = 0 if self.samples.is_mapped else None
        others = [Direct(number, dim) for number in sorted(learned.others)]
        return others + [Direct(number, self._dim(number)) for number in self.own]

    def evaluate(self, record: Record, handles: Leaves, learned: LearnedUses) -> Image:
        """Outputs and extras of all samples, ``[B, …]``."""
        params = self.tracked(learned)
        leaves = list(self.samples.leaves)
        for number, leaf in self.own.items():
            leaves[leaf] = handles[number]

        def recorded(values: Leaves, data: Leaves) -> Image:
            primals = dict(zip(params, values, strict=True))
            primals |= {number: data[leaf] for number, leaf in self.own.items()}
            every = tuple(primals[number] for number in range(len(handles)))
            placing = VmappedSamples(self.size, innermost())
            return record(placing, every, lambda: self.of_one(every, data))

        dims = [0 if number in learned.others else None for number in params]
        samples = replace(self.samples, leaves=tuple(leaves))
        return samples.map(recorded, tuple([handles[number] for number in params]), dims)

    def _dim(self, number: int) -> int | None:
        """The dimension of the samples in a primal."""
        return self.samples.dims[self.own[number]] if number in self.own else None


@dataclass(eq=False)
class WholeBatch:
    """A call that takes all samples at once, evaluated as its owner does.

    Args:
        dims: for each primal the dimension of the samples; None if all samples share it.
        placing: says where the tensors of the evaluation hold the samples.
        trace: is told of all operations, in an evaluation for that alone.
    """

    call: LeafFunction
    primals: Leaves
    dims: Dims
    size: int
    placing: PlainSamples
    trace: Trace | None = None

    @property
    def params(self) -> Leaves:
        pairs = zip(self.primals, self.dims, strict=True)
        return tuple([x if dim is None else x.select(dim, 0) for x, dim in pairs])

    def tracked(self, learned: LearnedUses) -> Sequence[int]:
        return [n for n, d in enumerate(self.dims) if d is None and n not in learned.others]

    def handle(self, number: int, anchor: Tensor, learned: LearnedUses) -> Tensor:
        is_lent = self.dims[number] is None and learned.is_lent(number)
        return anchor.view_as(anchor) if is_lent else writable_copy(anchor)

    def direct(self, learned: LearnedUses) -> list[Direct]:
        own = [Direct(number, dim) for number, dim in enumerate(self.dims) if dim is not None]
        if self.size == 1:  # all rows are of this sample
            own += [Direct(number, None) for number in sorted(learned.others)]
        return own

    def evaluate(self, record: Record, handles: Leaves, learned: LearnedUses) -> Image:
        self.placing.seen.clear()
        is_one = self.size == 1 or self.trace is not None
        placing = VmappedSamples(1, None, self.trace) if is_one else self.placing
        outputs, extras = record(placing, handles, lambda: self.call(*handles))
        count = len(outputs)
        place = self._of_one if is_one else self._of_all
        leaves = [place(~number, x, number < count) for number, x in enumerate((*outputs, *extras))]
        return tuple(leaves[:count]), tuple(leaves[count:])

    def _of_one(self, number: int, leaf: Tensor, is_output: bool) -> Tensor:
        """What was returned for one sample alone, ``[1, *out]``."""
        if self.trace is not None:
            self.trace.calls[number] = None, (), {}
            self.trace.results[number] = leaf
            return leaf
        if leaf.dim() and leaf.shape[0] != 1:
            raise Refused("for one sample it does not return a batch of one")
        return leaf if leaf.dim() else leaf.unsqueeze(0)

    def _of_all(self, number: int, leaf: Tensor, is_output: bool) -> Tensor:
        """What was returned for all samples, ``[B, *out]``."""
        try:
            layout = self.placing.layout((number, OUT), leaf, None)
        except NoLayout as error:
            raise Refused("what it returns does not hold the samples in one dimension") from error
        if layout is None and is_output:
            raise Refused("an output has no dimension with the samples")
        if layout == Layout(0):
            return leaf
        every = self.placing.placed(leaf, layout)
        return every.squeeze(1) if leaf.dim() else every


Batch: TypeAlias = VmappedBatch | WholeBatch
"""A function of its primals at all samples, in one of the two ways."""


class Handles(NamedTuple):
    """What the function gets for its primals, in one evaluation.

    Args:
        every: one for each primal.
        twins: what operations with rules get in the place of those that are tracked.
        starts: the nodes at which the graph of the evaluation begins, with numbers of primals.
        direct: anchors of the primals that are differentiated as they are.
        grad_mode: is a graph kept of the outputs?
        further: may the outputs be differentiated further, by primals that have a graph?
    """

    every: list[Tensor]
    twins: dict[int, Tensor]
    starts: dict[Any, int]
    direct: list[Anchor]
    grad_mode: bool
    further: bool

    @classmethod
    def of(cls, batch: Batch, learned: LearnedUses) -> Handles:
        check_plain(batch.primals)
        grad_mode = torch.is_grad_enabled()
        further = grad_mode and any(primal.requires_grad for primal in batch.primals)
        with recording():
            anchors = [differentiable_alias(primal, grad_mode) for primal in batch.primals]
            twins = {number: anchors[number] for number in batch.tracked(learned)}
            every = [batch.handle(i, anchor, learned) for i, anchor in enumerate(anchors)]
            # the function may write into these
            direct = [Anchor.behind(every[x.number]) for x in batch.direct(learned)]
        starts = {handle.grad_fn: number for number, handle in enumerate(every)}
        return cls(every, twins, starts, direct, grad_mode, further)
