"""What is compared with another batch: a module's outputs and derivatives, a loss's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._linear_map import Dims, Samples, differentiable_alias
from jacfunc._log import note
from jacfunc._memory import COMPARED_GRAPH_BYTES, DispatchMode, PeakBytes
from jacfunc._samples.halves import Half, Quantity, at, halves
from jacfunc._torch import MathAttention, RandomState, recording, run_backward
from jacfunc._types import Leaves, is_differentiable

GradientOf: TypeAlias = Callable[[Tensor, Tensor], Leaves]
"""``gradient_of(numbers, others)``: the gradient of the loss in the outputs, for another batch: its
place n has the outputs of sample ``numbers[n]``, and the targets of sample ``others[n]``."""

MANY = 64
"""Samples that are compared at once in any case, unless memory is to be spared."""


@dataclass(frozen=True)
class Subject:
    """A module at a batch, whose samples may depend on each other.

    Args:
        whole: ``whole(params, leaves)`` returns the differentiable outputs of a batch.
        params: tensors that are differentiable.
        width: numbers that each sample is differentiated by.
        by_inputs: are tensors of the batch differentiated?
        as_evaluated: returns, after an evaluation, a function for its pullbacks to call first.
    """

    whole: Callable[[Leaves, Leaves], Leaves]
    params: Leaves
    samples: Samples
    width: int
    by_inputs: bool
    as_evaluated: Callable[[], Callable[[], None]]

    @cached_property
    def size(self) -> int:
        """How many samples there are."""
        return self.samples.size

    @property
    def has_different_samples(self) -> bool:
        """Is one sample different from the next, in any tensor?"""
        pairs = zip(self.samples.leaves, self.samples.dims, strict=True)
        dense = ((x.detach().to_dense(), d) for x, d in pairs if d is not None)
        moved = ((x, x.roll(1, d)) for x, d in dense)
        return not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in moved)

    def of(self, numbers: Tensor) -> Subject:
        """The module at other samples, taken from this batch by their numbers."""
        pairs = zip(self.samples.leaves, self.samples.dims, strict=True)
        leaves = tuple(x if d is None else at(x, numbers, d) for x, d in pairs)
        return replace(self, samples=replace(self.samples, leaves=leaves))

    def fitting(self, random_state: RandomState) -> int:
        """How many samples are compared at once: as many as have a graph of modest size."""
        size: int = self.size
        if size <= MANY:
            return size
        with PeakBytes() as counter:
            try:
                graph = self.of(torch.arange(2, device="cpu")).evaluate(random_state)
            except Exception as error:  # a module may take batches of one size
                note("two samples could not be evaluated, to see what they take: %s", error)
                return size
            of_two: int = counter.live - sum(x.nbytes for x in self.params)  # copies
            del graph
        return min(size, max(MANY, 2 * COMPARED_GRAPH_BYTES // max(1, of_two)))

    def evaluate(self, random_state: RandomState) -> BatchGraph:
        """Its outputs on a graph that leads to everything differentiable."""
        random_state.repeat()
        # other threads may turn the plain formula of attention on or off between two evaluations
        with recording(), MathAttention():
            inputs = filter(is_differentiable, self.samples.leaves) if self.by_inputs else ()
            followed = {id(x) for x in (*self.params, *inputs)}
            every = (*self.params, *self.samples.leaves)
            pairs = ((x, id(x) in followed) for x in every)
            anchors = tuple(differentiable_alias(x, False) if yes else x for x, yes in pairs)
            copies = tuple(x.clone() for x in anchors)  # a module may write into what it gets
            count = len(self.params)
            outputs = self.whole(copies[:count], copies[count:])
            return BatchGraph(outputs, anchors, count, self.samples.dims, self.as_evaluated())


@dataclass(frozen=True)
class BatchGraph:
    """Outputs of a batch on their graph, which leads to anchors: parameters, then inputs.

    ``renew`` puts back what was evaluated: a backward pass may run the module again.
    """

    outputs: Leaves
    anchors: Leaves
    num_params: int
    dims: Dims
    renew: Callable[[], None]

    def pull(self, cotangents: Leaves) -> list[Tensor | None]:
        """Gradients in the anchors; None where there is none."""
        live = [i for i, out in enumerate(self.outputs) if out.requires_grad]
        targets = tuple(x for x in self.anchors if x.requires_grad)
        if not live or not targets:
            return [None] * len(self.anchors)
        # a backward pass of a user's may write into them
        seeds = tuple(cotangents[i].clone() for i in live)
        self.renew()
        with MathAttention():  # checkpoints run again
            pulled = iter(run_backward(tuple(self.outputs[i] for i in live), targets, seeds, False))
        grads = (next(pulled) if x.requires_grad else None for x in self.anchors)
        return [None if grad is None else grad.to_dense() for grad in grads]

    def quantities(self, half: Half, cotangents: Leaves | None) -> list[Quantity]:
        """All that must not change with the samples outside the half.

        Without cotangents these are outputs alone, and no derivatives.
        """
        rows = (half.rows(out.detach()) for out in self.outputs)
        quantities = [Quantity("outputs", out) for out in rows if out is not None]
        if cotangents is None:
            return quantities
        grads = [
            torch.zeros_like(x) if grad is None and x.requires_grad else grad
            for x, grad in zip(self.anchors, self.pull(cotangents), strict=True)
        ]
        own, of_leaves = grads[: self.num_params], grads[self.num_params :]
        for grad, dim in zip(of_leaves, self.dims, strict=True):
            if grad is not None and dim is not None:
                what, outside = "derivatives in inputs", at(grad, half.outside, dim)
                quantities.append(Quantity(what, at(grad, half.inside, dim)))
                quantities.append(Quantity(what, outside, must_be_zero=True))
        shared = [grad for grad, d in zip(of_leaves, self.dims, strict=True) if d is None]
        sums = [grad for grad in (*own, *shared) if grad is not None]
        of_params = [Quantity("derivatives in parameters", x, is_sum=True) for x in sums]
        return quantities + of_params


@dataclass(frozen=True)
class Coupling:
    """What a comparison of batches has shown.

    Args:
        what: what of a sample changes with the others, in words; None if nothing does.
        rows: outputs of a sample.
        entries: entries of all samples' Jacobians together.
        was_evaluated: could the batch be evaluated as a whole?
        was_shown: were the samples different from each other, so that something could show?
    """

    what: str | None = None
    rows: int = 0
    entries: int = 0
    was_evaluated: bool = True
    was_shown: bool = True


def loss_coupling(gradient_of: GradientOf, outputs: Leaves, number: int) -> Coupling:
    """Whether the gradient in the outputs of some samples changes when the others are replaced.

    It must stay where the outputs of the others are replaced, and not their targets. Where targets
    are replaced, too, a mean over the targets that are not ignored has other weights: but a
    gradient of zero must stay zero.
    """
    size, random_state = len(outputs[0]), RandomState(outputs)
    if size == 1:
        return Coupling()
    generator = torch.Generator().manual_seed(number)
    in_order = torch.arange(size, device="cpu")

    def rows(whose_outputs: Tensor, whose_targets: Tensor, half: Half) -> list[Quantity]:
        random_state.repeat()
        leaves = gradient_of(whose_outputs, whose_targets)
        return [Quantity("gradients", at(leaf, half.inside, 0)) for leaf in leaves]

    def changes(half: Half) -> bool:
        own, other = rows(in_order, in_order, half), rows(half.sources, in_order, half)
        moved = rows(half.sources, half.sources, half)
        if not all(map(_have_same_zeros, own, moved)):
            return True
        if all(one.agrees(two) for one, two in zip(own, other, strict=True)):
            return False
        again = rows(in_order, in_order, half)
        triples = zip(own, other, again, strict=True)
        return any(a.is_same_as(c) or not a.agrees_roughly(b) for a, b, c in triples)

    # it costs little beside the module, so all halves are looked at: one sample may decide alone
    for half in halves(size, generator):
        if changes(half) or changes(half.other(generator)):
            return Coupling("gradients")
    random_state.repeat()
    return Coupling()


def _have_same_zeros(one: Quantity, other: Quantity) -> bool:
    """Do both have a gradient of zero for the same samples?"""
    first, second = [(x.tensor != 0).reshape(len(x.tensor), -1).any(1) for x in (one, other)]
    return torch.equal(first, second)


class OperationsCalled(DispatchMode):
    """Records the operations that run, and the shapes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [x.shape for x in args if isinstance(x, Tensor)]
        self.operations.append((func, shapes))
        return func(*args, **(kwargs or {}))
