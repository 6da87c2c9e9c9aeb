"""Finds operations that may mix the samples of a batch, whether or not the outputs show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import is_out_of_memory
from jacfunc._layouts.evidence import agree, has_numbers
from jacfunc._layouts.layouts import layouts_between
from jacfunc._layouts.recording import OperationRecorder, recorders
from jacfunc._layouts.traces import Copying, Listener, OperationCall, Trace, pairs_in
from jacfunc._log import note
from jacfunc._memory import DispatchMode
from jacfunc._types import Leaves

_NEW = frozenset(
    getattr(Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")
)
"""Functions that take dtype and device alone from their first argument."""

_UNFILLED = frozenset(
    {
        *(torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty_strided),
        *(getattr(torch.ops.aten, name).default for name in ("empty_like", "empty_strided")),
        *(getattr(torch.ops.aten, name).default for name in ("new_empty", "new_empty_strided")),
        torch.ops.aten.empty.memory_format,
    }
)
"""Functions and operators whose results have no numbers until something is written into them."""

_WITHOUT_NUMBERS = _NEW | _UNFILLED

_CAST = frozenset({Tensor.to, Tensor.type_as})
"""Functions that take dtype and device alone from all other arguments."""

_BY_NUMBERS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Marks of operators that hand numbers to code, or that have results of as many as they tell."""


@dataclass
class Mixing:
    """Compares each result with the one in another batch, while a batch is evaluated.

    A result mixes samples if it was made of a tensor that holds samples and holds none itself, such
    as a mean over the batch, or if it holds for a sample other numbers than in the other batch. The
    outputs need not show that: a factor may be zero today, and another number tomorrow.

    Args:
        trace: the operations of the other batch.
        size: how many samples this batch has.
    """

    trace: Trace
    size: int
    was_seen: bool = False

    def begin(self) -> None:
        self.was_seen = False

    def hear(self, operation: OperationCall) -> None:
        """Look at one operation of this batch."""
        number, func, args, kwargs, result = operation
        if self.was_seen or func in _WITHOUT_NUMBERS or number not in self.trace.calls:
            return
        other_func, other_args, other_kwargs = self.trace.calls[number]
        if other_func != func:
            return
        if func in _CAST:
            args, kwargs = args[:1], {}
        own = list(pairs_in((args, kwargs), (other_args, other_kwargs)))
        results = list(pairs_in(result, self.trace.as_made(number)))
        if any(x.is_nested for pair in own for x in pair) or not all(map(_are_dense, results)):
            self.was_seen = True  # these can't be compared: take the worse case
            return
        holds_samples = any(one.shape != other.shape for one, other in own)
        for one, other in results:
            if one.shape == other.shape:
                self.was_seen |= holds_samples or not agree(one, other)
            else:
                self.was_seen |= not self._is_by_sample(one, other)

    def _is_by_sample(self, one: Tensor, other: Tensor) -> bool:
        """Has each sample in one dimension the numbers that it has in the other batch?"""
        samples = self.trace.samples
        layouts = layouts_between(one.shape, self.size, other.shape, len(samples))
        return any(has_numbers(one, self.size, other, samples, layout) for layout in layouts)


class _UnseenOperations(DispatchMode):
    """Tells a listener of operations that no recorder sees, as those of TorchScript."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self.operations: list[Any] = []
        self.are_chosen = False
        """Do numbers say what is done next?"""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # inside an operation that a recorder sees there is none to see another
        is_unseen = bool(recorders())
        result = func(*args, **kwargs or {})
        if is_unseen:
            self.are_chosen |= not _BY_NUMBERS.isdisjoint(func.tags)
            number = len(self.operations)
            self._listener.hear(OperationCall(number, func, args, kwargs or {}, result))
            self.operations.append(func)
        return result


def mixes_unseen(
    evaluate: Callable[[Leaves], object], leaves: Leaves, size: int, trace: Trace, other: Leaves
) -> bool:
    """May operations mix samples where no recorder sees them, as far as evaluations tell?

    So they may if numbers say what is done next. These evaluations come beside those whose
    operations are compared: what looks on makes some call others.

    Args:
        leaves: of this batch, which has so many samples.
        trace: an empty one of the other batch.
        other: the tensors of that.
    """
    seen = _UnseenOperations(Copying(trace))
    try:
        with seen, OperationRecorder():
            evaluate(other)
        if seen.are_chosen or not seen.operations:
            return seen.are_chosen
        mixing = Mixing(trace, size)
        own = _UnseenOperations(mixing)
        with own, OperationRecorder():
            evaluate(leaves)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        note("whether operations mix samples unseen was not seen: %s", error)
        return seen.are_chosen
    return mixing.was_seen or own.are_chosen or own.operations != seen.operations


def _are_dense(pair: tuple[Tensor, Tensor]) -> bool:
    """Have both tensors a number in each place?"""
    return not any(x.is_nested or x.is_quantized or x.layout != torch.strided for x in pair)


def copy_written(trace: Trace, evaluate: Callable[[Leaves], object], other: Leaves) -> None:
    """Copy what operations of a traced batch have returned, where it was written into later."""
    if (copies := trace.written()) is not None:
        with OperationRecorder(copies):
            evaluate(other)


def may_mix(
    evaluate: Callable[[Leaves], object],
    leaves: Leaves,
    size: int,
    others: Iterable[tuple[list[int], Leaves]],
) -> bool:
    """May operations mix the samples of a batch? It is compared with another batch, step by step.

    Args:
        evaluate: evaluates the tensors of a batch.
        leaves: those of this batch, which has so many samples.
        others: numbers of the samples of which other batches are made, and their tensors.
    """
    try:
        for numbers, other in others:
            if mixes_unseen(evaluate, leaves, size, Trace(numbers), other):
                return True
            trace = Trace(numbers)
            with OperationRecorder(trace):
                evaluate(other)
            copy_written(trace, evaluate, other)
            mixing = Mixing(trace, size)
            with OperationRecorder(mixing) as recorder:
                evaluate(leaves)
            if trace.is_like(recorder.operations):
                return mixing.was_seen
    except Exception as error:  # tensors inside a vmap have no numbers, or a module takes one size
        if is_out_of_memory(error):
            raise
        note("whether operations mix samples was not seen: %s", error)
    return True  # nothing was compared: take the worse case
