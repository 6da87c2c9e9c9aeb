"""A batch of a kind that was evaluated before, and of which nothing is left to learn."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from jacfunc._assembly import shared_units
from jacfunc._errors import Refused
from jacfunc._factored import LearnedUses
from jacfunc._faults import TAKES_DERIVATIVES, NestedWatch, is_unwatched
from jacfunc._layouts import Args, Layout, OperationRecorder
from jacfunc._lending import ModuleState
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    differentiable_alias,
    map_of_graph,
    writable_copy,
)
from jacfunc._log import note
from jacfunc._memory import keep_heap
from jacfunc._rounding import are_near
from jacfunc._samples.call import ALONE_ROUNDING, SampledCall
from jacfunc._torch import (
    MathAttention,
    Pull,
    RandomState,
    memories_of,
    recording,
    run_as_written,
)
from jacfunc._types import Tree

MOST_MISSES = 3
"""After so many calls that had to be taken anew, a kind of call is no more tried so."""

PLAIN, ALONE = (False, False), (False, False, 1)
"""Around pullbacks of many samples and of one, which are not differentiated further."""


class _Operations(OperationRecorder):
    """Numbers the operations of a function, of which no parameter is looked for."""

    def call(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        if func in TAKES_DERIVATIVES:
            raise Refused("the function takes a derivative itself, of what may stand for others")
        # nobody reads what retain_grad keeps, and a second sweep would add to that
        return None if func is Tensor.retain_grad else func(*args, **kwargs)


class SettledBatch:
    """A module at a tensor with the samples in front, as it was evaluated before.

    It returned one tensor with the samples in front, ran as a whole, and all its rows were swept at
    once onto the input. So it is evaluated and swept again, with all checks of an evaluation; but
    what earlier ones have shown is not looked up on the way.

    Args:
        batch: an earlier call of this kind.
        output: what that one returned.
        is_watched: must each evaluation be watched?
    """

    def __init__(
        self, batch: SampledCall, state: ModuleState, output: Tensor, is_watched: bool
    ) -> None:
        self.api, self.kind, self.state = batch.api, batch.kind.kind, state
        self.is_alone = batch.size == 1
        self.learned = batch.learned_as_a_whole
        self.output = output.shape, output.dtype
        self.is_watched = is_watched
        self.misses = 0

    @classmethod
    def of(cls, batch: SampledCall, state: ModuleState, call: object, output: Tree) -> Self | None:
        """What a call has settled; None if it returned another tree."""
        is_alone = batch.size == 1
        if type(output) is not Tensor:
            return None
        if not (is_alone or are_in_front(batch.learned_as_a_whole)):
            return None
        return cls(batch, state, output, not is_unwatched(call, ALONE if is_alone else PLAIN))

    @property
    def is_over(self) -> bool:
        """Had too many calls to be taken anew?"""
        return self.misses >= MOST_MISSES

    def jacobian(self, x: Tensor, compared: Container[int]) -> Tensor | None:
        """``[B, *out, *in]``; None where the call must be taken anew, as it shows something new.

        Args:
            compared: signatures of evaluations after which batches were compared.

        Raises:
            RuntimeError: if the module wrote into a parameter that was no copy.
        """
        random_state, rows = RandomState((x, *self.state.params.values())), None
        try:
            with torch.no_grad(), self.state.lent_for_call(self.api, is_current=True):
                try:
                    rows = self._rows(x, compared)
                except Exception as error:  # as it is told of when it is taken anew
                    note("a kind of call that was settled is taken anew: %s", error)
        except BaseException:
            random_state.repeat()
            raise
        if rows is None or random_state.has_changed():
            random_state.repeat()
            rows = None
        self.misses = 0 if rows is not None else self.misses + 1
        return rows

    def _rows(self, x: Tensor, compared: Container[int]) -> Tensor | None:
        keep_heap()
        operations = _Operations(None)
        with recording(), MathAttention():
            own = writable_copy(differentiable_alias(x, False))
            start, anchor = own.grad_fn, Anchor.behind(own)
            watch = self._watch(own) if self.is_watched else None
            # of one sample nothing can be learned of others
            recorder = nullcontext() if self.is_alone else operations
            with watch or nullcontext(), self.state.lent_for_evaluation({}), recorder:
                out = run_as_written(self.state.module, own)
            if watch is not None:
                watch.check_copies((x,))
        if type(out) is not Tensor or (out.shape, out.dtype) != self.output:
            return None
        if not (self.is_alone or self._is_known(operations, compared)) or not out.requires_grad:
            return None
        graph = Graph.back_to({start}, (out,))
        linearization = map_of_graph((out,), (), (anchor,), graph, False)
        if not linearization.is_batchable:
            return None
        seeds = shared_units((out,))
        (product,) = linearization.pull_batch(seeds)
        if 0 in product.stride() or len({*memories_of((product, *seeds))}) == 1:
            product = product.clone()
        if operations.reads_values and not self._are_alone(x, out):
            return None
        if out.dim() == 1:
            return product[0]
        rows = product.transpose(0, 1)
        return rows if out.dim() == 2 else rows.unflatten(1, out.shape[1:])

    def _watch(self, own: Tensor) -> NestedWatch:
        """The watch of an evaluation at this copy of the input."""
        leads_out = LeadsOut({own.grad_fn}, grad_mode=False, has_left=False)
        return NestedWatch(Pull(None, ALONE if self.is_alone else PLAIN, leads_out), primals=(own,))

    def _is_known(self, operations: OperationRecorder, compared: Container[int]) -> bool:
        """Does what was learned of many samples hold for an evaluation with these operations?"""
        learned, signature = self.learned, operations.signature
        if operations.moves_samples or learned.moves_samples or learned.others:
            return False
        if learned.mixes and not operations.reads_values:
            return False
        return signature in learned.signatures and signature in compared

    def _are_alone(self, x: Tensor, out: Tensor) -> bool:
        """Are outputs those of each sample alone, whose numbers may lead another way?"""
        rows = []
        for number in range(len(x)):
            with self.state.lent_for_evaluation({}):
                rows.append(run_as_written(self.state.module, x[number : number + 1].clone()))
        if any(type(row) is not Tensor or row.shape[1:] != out.shape[1:] for row in rows):
            return False
        alone = torch.cat(rows)
        is_like = (alone.shape, alone.dtype) == self.output
        return is_like and are_near(out.detach(), alone, ALONE_ROUNDING, lead=1)


def are_in_front(learned: LearnedUses) -> bool:
    """Have evaluations shown that all tensors with samples have these in front?"""
    sites = (learned.sites or {}).values()
    return bool(sites) and all(site is not None and site.layout == Layout(0) for site in sites)
