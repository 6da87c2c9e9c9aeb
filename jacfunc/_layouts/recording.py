"""Records the operations that a function calls, and what they may depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jacfunc._layouts.questions import ASKING, Questions
from jacfunc._layouts.telling import (
    APART,
    BARE,
    CHOOSING,
    LEAVING,
    MOVING,
    MOVING_BY_ITSELF,
    READING,
    TELLING,
    VALUES,
    ConstantIntegers,
    are_among,
    is_chosen_by_tensor,
    note_values,
    tensors_in,
)
from jacfunc._layouts.traces import Listener, OperationCall
from jacfunc._torch import PULLED, all_modes, untracked

Args: TypeAlias = tuple[Any, ...]
Ids: TypeAlias = Container[int]

_ROWS = frozenset({tuple, list, torch.Size})
KIND = attrgetter("shape", "dtype")

FEWEST_PULLED = 2**11
"""From so many numbers on it pays to look for an operation whose pullback is faster."""


class OperationRecorder(TorchFunctionMode):
    """A context that numbers the operations of a function, from where the user's part begins.

    Args:
        listener: is told of all operations, if there is one.
        noticed: operations that :meth:`call` sees; all others are called as they are.
        tracked: identities of tensors; operations with one of these are seen as well.
    """

    graph = 0
    """The number of the graph of what the function returned, once that was looked at."""
    moves_samples = False
    """Has the function moved numbers to where other numbers say?"""
    moves_unseen = False
    """Are these other numbers not all in the signature?"""
    reads_values = False
    """Did Python read numbers, of which nothing tells what each sample alone would have shown?"""
    samples = 0
    """How many there are, if reads are to be told that each of them alone would answer alike."""
    pulls_many = True
    """Are many cotangents pulled back at once? For one, torch's own products are faster."""
    num_followed = 0
    """So many operations and values were compared with known ones, and are not noted."""
    _buffers: Sequence[tuple[Tensor, int]] = ()
    _constants: ConstantIntegers | None = None
    _questions: Questions | None = None
    _is_bare = False
    """May numbers be written into unseen?"""
    _is_over = False

    def __init__(
        self, listener: Listener | None = None, noticed: Collection[Any] = (), tracked: Ids = ()
    ) -> None:
        self._listener, self._noticed, self._tracked = listener, noticed, tracked
        self.kinds: list[Any] | None = None
        """Shapes and dtypes of the tensors that operations get, if somebody wants them."""
        self.arguments: dict[int, Sequence[Tensor]] = {}
        """These tensors, by the numbers of operations that are wanted; all else may be freed."""
        self.wanted: Container[int] | None = None  # which are all of them
        self.operations: list[Any] = []
        """Functions that were called, and plain values that they were called with."""
        self.apart = set[int]()
        """Numbers of the samples of which Python would have read something else of each alone."""

    @property
    def signature(self) -> int:
        """Equal for evaluations of one graph that called the same functions with equal values."""
        return hash((self.graph, *self.operations))

    def call(
        self,
        number: int,
        func: Callable[..., Any],
        args: Args,
        kwargs: Mapping[str, Any],
        is_tracked: bool,
    ) -> Any:
        """The result of the operation with this number; does it get a tracked tensor?"""
        return func(*args, **kwargs)

    def begin(self, module: nn.Module, buffers: Iterable[Tensor]) -> None:
        """Forget all: only what follows is part of the user's function, a module's call.

        Args:
            buffers: those of the module, before it was lent others.
        """
        self.operations.clear()
        self._constants, self._buffers, self._questions = None, (), None
        with untracked():
            if not all(x.is_floating_point() for x in buffers):
                every = [x for x in module.buffers() if not x.is_floating_point()]
                self._buffers = [(x, x._version) for x in every if not x.is_inference()]
        self.arguments.clear()
        if self.kinds is not None:
            self.kinds.clear()
        if self._listener is not None:
            self._listener.begin()
        self._is_over = False

    def end(self) -> None:
        """Count no operations from here on."""
        self._is_over = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        # called for every operation: as short as it can be
        kwargs, is_tracked = kwargs or {}, False
        if self._is_over:
            return func(*args, **kwargs)
        operations, tracked = self.operations, self._tracked
        number, tensors = len(operations) + self.num_followed, list[Tensor]()
        operations += (func,)
        for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in VALUES:
                operations += (APART[value],) if value in APART else (value,)
                continue
            if kind in _ROWS and VALUES.issuperset(map(type, value)):  # as strides are
                operations.append(len(value))
                operations.extend(map(APART.get, value, value))
                continue
            if tracked and id(value) in tracked:
                is_tracked = True
            elif kind is not Tensor:
                note_values(value, operations)
                is_tracked = is_tracked or are_among((value,), tracked)
            if kind is Tensor:
                tensors += (value,)
            elif self.kinds is not None:
                tensors += tensors_in((value,))
        if func in TELLING:
            self._note_telling(func, args, kwargs)
        if self.kinds is not None:
            self.kinds += map(KIND, tensors)
            if self.wanted is None or number in self.wanted:
                self.arguments[number] = tensors
        if is_tracked or func in self._noticed:
            result = self.call(number, func, args, kwargs, is_tracked)
        else:  # the usual case
            is_large = func in PULLED and args and args[0].numel() >= FEWEST_PULLED
            result = (PULLED[func] if is_large and self.pulls_many else func)(*args, **kwargs)
        kind = type(result)
        if not result.dtype.is_floating_point if kind is Tensor else kind in (tuple, list):
            self._note_integers(OperationCall(number, func, args, kwargs, result))
        if self._listener is not None:
            self._listener.hear(OperationCall(number, func, args, kwargs, result))
        return result

    def _note_integers(self, operation: OperationCall) -> None:
        """Note what is made of constants alone, and what may answer a question to all samples."""
        self._known_integers.note(*operation[2:])
        if operation.func in ASKING:
            self._asked.note(*operation)

    @property
    def _known_integers(self) -> ConstantIntegers:
        """Made where the first one is met: most modules have none."""
        if self._constants is None:
            self._constants = ConstantIntegers(self._buffers)
        return self._constants

    @property
    def _asked(self) -> Questions:
        """Made where the first one may be asked; empty where numbers may be written into unseen."""
        if self._questions is None or self._is_bare:
            self._questions = Questions()
        return self._questions

    def _note_telling(
        self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> None:
        """Note what numbers tell: what Python does next, or where an operation moves others."""
        if func in READING:
            self._note_reading(func, args)
        self.reads_values |= func in LEAVING and torch.is_grad_enabled()
        if func in BARE:
            self._known_integers.forget()
            self._is_bare = True
        chooses = func in CHOOSING and is_chosen_by_tensor(args)
        if chooses or func in MOVING:
            others = args[1:2] if chooses else (*args[1:], *kwargs.values())
            is_told = func not in MOVING_BY_ITSELF
            numbers = self._known_integers.numbers_in(others) if is_told else None
            if numbers is None and chooses and self.samples:
                numbers = self._known_integers.chosen_in_each(func, args, self.samples)
            self.operations.append(numbers)
            self.moves_samples = True
            self.moves_unseen |= numbers is None

    def _note_reading(self, func: Callable[..., Any], args: Args) -> None:
        """Note what Python reads: whether each sample alone would have shown the same."""
        numbers = None
        if not any(map(Tensor.is_floating_point, tensors_in(args))):
            numbers = self._known_integers.numbers_in(args)
        if numbers is not None:  # no sample has said them
            self.operations.append(numbers)
            return
        with untracked():
            question = None if self._is_bare else self._asked.read(func, args)
            apart = question.apart(self.samples) if question and self.samples else None
            if question is not None:
                answer = None if apart is None else bool(question.answer)
                self.operations += (question.number, answer)
        self.reads_values |= apart is None
        self.apart.update(apart or ())


def begins(module: nn.Module, buffers: Iterable[Tensor]) -> None:
    """Tell recorders that operations are counted from here, where the user's function begins.

    What is done before, to lend a module, may change from one evaluation to the next.
    """
    for recorder in recorders():
        recorder.begin(module, buffers)


def ends() -> None:
    """Tell recorders that the user's function is over."""
    for recorder in recorders():
        recorder.end()


def recorders() -> list[OperationRecorder]:
    """The recorders around this call, if torch would show them an operation now."""
    modes = all_modes() if torch._C._is_torch_function_mode_enabled() else ()
    return [mode for mode in modes if isinstance(mode, OperationRecorder)]
