"""What Python asks of all samples at once, and which of them would answer otherwise alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._layouts.telling import functions_named, tensors_in

_ALL = functions_named(("all",))
_ANY = functions_named(("any",))
_SUM = functions_named(("sum",))
_EQUAL = functions_named(("eq", "__eq__"))
ASKING = _ALL | _ANY | _SUM | _EQUAL


class Question(NamedTuple):
    """Are all entries of a tensor true, or is any one?

    Args:
        number: of the operation that has answered it.
        entries: the tensor.
        answer: a tensor that has the answer; or how many entries are true, if it ``counts`` them.
        versions: of both when it was answered.
    """

    number: int
    entries: Tensor
    answer: Tensor
    versions: tuple[int, int]
    is_all: bool
    counts: bool = False

    @property
    def is_as_answered(self) -> bool:
        """Were both tensors left as they were?"""
        return self.versions == (self.entries._version, self.answer._version)

    def apart(self, size: int) -> Sequence[int] | None:
        """Numbers of the samples, of so many, of which each alone would answer otherwise.

        None if there are not so many in front, so that it can't be told.
        """
        entries = self.entries.detach()
        if size == 1:
            return ()
        if entries.shape[:1] != (size,):
            return None
        if bool(self.answer) is self.is_all:  # all are true of each sample, too, or none is
            return ()
        rows = entries.flatten(1) if entries.dim() > 1 else entries.unsqueeze(1)
        others = rows.all(1) if self.is_all else rows.any(1).logical_not()
        return [number for number, is_other in enumerate(others.tolist()) if is_other]


class Questions:
    """The questions of one evaluation, each known by the tensor that answers it."""

    def __init__(self) -> None:
        self._by_id = dict[int, Question]()

    def note(
        self, number: int, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Question | None:
        """Take in an operation, which may answer a question; that question, if it does."""
        question = None
        if func in ASKING and not kwargs and type(result) is Tensor:
            question = self._answered(number, func, args, result)
        if question is not None:
            self._by_id[id(result)] = question
        return question

    def read(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Question | None:
        """The question that Python reads an answer to, if a read of this tensor is that."""
        question = self._by_id.get(id(args[0])) if len(args) == 1 else None
        if question is None and func is Tensor.__contains__:
            return _asked_of_elements(*args)
        is_known = question is not None and question.is_as_answered and not question.counts
        return question if is_known else None

    def among(self, values: Any) -> Iterator[Question]:
        """The questions to which tensors among values, and in lists of them, are the answers."""
        for tensor in tensors_in(values):
            if id(tensor) in self._by_id:
                yield self._by_id[id(tensor)]

    def _answered(
        self, number: int, func: Any, args: tuple[Any, ...], answer: Tensor
    ) -> Question | None:
        entries = args[0]
        if len(args) == 1 and func not in _EQUAL:
            if not _is_dense(entries) or (func in _SUM and entries.dtype != torch.bool):
                return None
            versions = entries._version, answer._version
            return Question(number, entries, answer, versions, func not in _ANY, func in _SUM)
        count = self._by_id.get(id(entries))
        if len(args) != 2 or count is None or not (count.counts and count.is_as_answered):
            return None
        if type(args[1]) is not int or args[1] != count.entries.numel():
            return None
        versions = count.versions[0], answer._version
        return count._replace(number=number, answer=answer, versions=versions, counts=False)


def _asked_of_elements(entries: Any, element: Any = None) -> Question | None:
    """Is any entry equal to a plain number?"""
    if type(element) not in (bool, int, float) or not _is_dense(entries):
        return None
    equal = entries.detach() == element
    return Question(-1, equal, equal.any(), (0, 0), is_all=False)


def _is_dense(value: Any) -> bool:
    """Is it a plain tensor with a number in each place, whose writes are counted?"""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_nested:
        return False
    return not (value.is_inference() or value.is_quantized)
