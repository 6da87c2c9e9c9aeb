"""Evaluates other batches, to compare what operations do there, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from jacfunc._errors import is_out_of_memory
from jacfunc._layouts.mixing import Mixing
from jacfunc._layouts.recording import OperationRecorder, recorders
from jacfunc._layouts.traces import Copying, Listener, OperationCall, Trace
from jacfunc._log import note
from jacfunc._memory import DispatchMode
from jacfunc._types import Leaves

_BY_NUMBERS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Marks of operators that hand numbers to code, or that have results of as many as they tell."""


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
        with seen, OperationRecorder() as recorder:
            evaluate(other)
        if seen.are_chosen or not seen.operations:
            return seen.are_chosen
        if recorder.reads_values or recorder.moves_unseen:
            return True  # these may get what was asked of all samples, or choose entries of others
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
