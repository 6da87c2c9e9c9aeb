"""Finds operations that may mix the samples of a batch, whether or not the outputs show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._layouts.evidence import agree, has_numbers
from jacfunc._layouts.layouts import layouts_between
from jacfunc._layouts.questions import Question, Questions
from jacfunc._layouts.recording import Args
from jacfunc._layouts.rowwise import are_equal, differ, is_rowwise
from jacfunc._layouts.telling import READING, are_positions, chooses_in_each, tensors_in
from jacfunc._layouts.traces import OperationCall, Trace, pairs_in

Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Tensors of this batch, each beside that of the other one."""

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
    _was_seen: bool = False
    _questions: Questions = field(default_factory=Questions)
    _answers: dict[int, bool] = field(default_factory=dict)
    """Identities of tensors that answer questions to samples, and whether these were read."""
    _positions: dict[int, Tensor] = field(default_factory=dict)
    """Tensors that number the samples, by their identity."""
    _relies: bool = False
    """Are there questions to samples, or choices of entries of each?"""
    _doubts: bool = False
    """Are samples equal somewhere, so that they may be exchanged unseen?"""

    def begin(self) -> None:
        self._was_seen = self._relies = self._doubts = False
        self._questions = Questions()
        self._answers.clear()
        self._positions.clear()

    @property
    def was_seen(self) -> bool:
        """May samples have been mixed?

        Not by a question to all of them whose answer Python alone gets: each evaluation tells which
        samples would answer otherwise, as :class:`OperationRecorder` does. For that it must be
        certain that each sample has its own entries, also where all samples are equal today.
        """
        is_open = self._relies and self._doubts
        return self._was_seen or is_open or not all(self._answers.values())

    def hear(self, operation: OperationCall) -> None:
        """Look at one operation of this batch."""
        number, func, args, kwargs, result = operation
        if self._was_seen or func in _WITHOUT_NUMBERS or number not in self.trace.calls:
            return
        other_func, other_args, other_kwargs = self.trace.calls[number]
        if other_func != func:
            return
        if func in _CAST:
            args, kwargs = args[:1], {}
        own = list(pairs_in((args, kwargs), (other_args, other_kwargs)))
        if self._is_question(operation, own, other_args):
            return
        results = list(pairs_in(result, self.trace.as_made(number)))
        if any(x.is_nested for pair in own for x in pair) or not all(map(_are_dense, results)):
            self._was_seen = True  # these can't be compared: take the worse case
            return
        holds_samples = any(one.shape != other.shape for one, other in own)
        for one, other in results:
            if one.shape == other.shape:
                self._was_seen |= holds_samples or not agree(one, other)
            elif not self._are_positions(one, other):
                self._note_layout(operation, own, one, other)
        self._doubts |= result is None and holds_samples  # something was written unseen
        self._was_seen |= self._uses_positions(operation, own)

    def _note_layout(
        self, operation: OperationCall, own: Pairs, one: Tensor, other: Tensor
    ) -> None:
        """Note whether a result has samples in one dimension, as the other batch has them."""
        _, func, args, kwargs, _ = operation
        samples = self.trace.samples
        layouts = layouts_between(one.shape, self.size, other.shape, len(samples))
        of = [x for x in layouts if x and has_numbers(one, self.size, other, samples, x)]
        self._was_seen |= not of
        if not of or self._doubts:
            return
        held = [(x, y) for x, y in own if x.shape != y.shape]
        if self._are_in_front([*held, (one, other)]):
            chooses = func is Tensor.__getitem__ and chooses_in_each(args, self.size)
            if is_rowwise(func, args, kwargs) or (chooses and id(args[1][0]) in self._positions):
                return
        rows = of[0].of_all(one, self.size)
        self._doubts = not (differ(rows) or (not own and are_equal(rows)))

    def _are_positions(self, one: Tensor, other: Tensor) -> bool:
        """Are these the numbers of the samples, from zero on?"""
        is_so = are_positions(one, self.size) and are_positions(other, len(self.trace.samples))
        if is_so:
            self._positions[id(one)] = one
        return is_so

    def _uses_positions(self, operation: OperationCall, own: Pairs) -> bool:
        """Is the number of a sample used otherwise than to choose entries of this sample?"""
        _, func, args, _, result = operation
        if not any(id(x) in self._positions for x, _ in own):
            return False
        if func is Tensor.__getitem__ and chooses_in_each(args, self.size):
            self._relies = True
            return id(args[1][0]) not in self._positions or not self._are_in_front(own[:1])
        made = list(tensors_in((result,)))
        is_metadata = not made and result is not None
        return not is_metadata and not all(id(x) in self._positions for x in made)

    def _is_question(self, operation: OperationCall, own: Pairs, other_args: Args) -> bool:
        """Is a question asked of all samples, which are in front, or is its answer used?

        Nothing but Python may get an answer, and nothing but a comparison may get a count; both
        must be those of the same question in the other batch.
        """
        number, func, args, kwargs, result = operation
        every = self._questions.among((*args, *kwargs.values()))
        of = [x for x in every if id(x.answer) in self._answers]
        is_same = all(other_args[0] is self.trace.results.get(x.number) for x in of)
        question = self._questions.note(number, func, args, kwargs, result)
        if func in READING:
            read = self._questions.read(func, args)
            if read is not None and read.number < 0:  # of elements, which need no other operation
                self._relies = True
                self._was_seen |= args[1] != other_args[1] or not self._are_in_front(own)
            self._was_seen |= bool(of) and not (is_same and read)
            self._answers.update((id(x.answer), True) for x in of)
            return True
        if of:
            self._was_seen |= not (is_same and question and self._counts_all(question, other_args))
            self._answers.update((id(x.answer), True) for x in of)
        elif question is None or not self._are_in_front(own):
            return False
        if question is not None:
            self._relies, self._answers[id(question.answer)] = True, False
        return True

    def _counts_all(self, question: Question, other_args: Args) -> bool:
        """Is a count of the other batch compared with the number of all entries, too?"""
        per_sample = question.entries.numel() // self.size
        return type(other_args[1]) is int and other_args[1] == per_sample * len(self.trace.samples)

    def _are_in_front(self, pairs: Pairs) -> bool:
        """Have tensors the samples in their first dimension, by their shapes in both batches?"""
        size, other_size = self.size, len(self.trace.samples)
        return all(
            one.shape[:1] == (size,) and other.shape == (other_size, *one.shape[1:])
            for one, other in pairs
        )


def _are_dense(pair: tuple[Tensor, Tensor]) -> bool:
    """Have both tensors a number in each place?"""
    return not any(x.is_nested or x.is_quantized or x.layout != torch.strided for x in pair)
