"""Records the operations that a function calls, and what they may depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from numbers import Number
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jacfunc._layouts.telling import (
    BARE,
    CHOOSING,
    LEAVING,
    MOVING,
    MOVING_BY_ITSELF,
    READING,
    TELLING,
    ConstantIntegers,
    is_chosen_by_tensor,
    tensors_in,
)
from jacfunc._layouts.traces import Listener, OperationCall
from jacfunc._torch import PULLED, all_modes, untracked

Args: TypeAlias = tuple[Any, ...]
Ids: TypeAlias = Container[int]

_PLAIN = frozenset({bool, int, float, str, torch.dtype, type(None), type(...)})
_ROWS = frozenset({tuple, list, torch.Size})
_KIND = attrgetter("shape", "dtype")

_APART: dict[Any, str] = {-2: "minus two"}
"""Python gives -1 and -2 the same hash: in signatures, which are hashes, a word stands for -2."""

FEWEST_PULLED = 2**11
"""From so many numbers on it pays to look for an operation whose pullback is faster."""


class WhatWasSeen(Protocol):
    """What was seen of the operations of an evaluation, as :class:`OperationRecorder` sees it."""

    @property
    def signature(self) -> int: ...

    @property
    def moves_samples(self) -> bool: ...

    @property
    def moves_unseen(self) -> bool: ...

    @property
    def reads_values(self) -> bool: ...


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
    """Did Python read numbers?"""
    pulls_many = True
    """Are many cotangents pulled back at once? For one, torch's own products are faster."""
    _buffers: Sequence[tuple[Tensor, int]] = ()
    _constants: ConstantIntegers | None = None
    _is_over = False

    def __init__(
        self, listener: Listener | None = None, noticed: Collection[Any] = (), tracked: Ids = ()
    ) -> None:
        self._listener, self._noticed, self._tracked = listener, noticed, tracked
        self.kinds: list[Any] | None = None
        """Shapes and dtypes of the tensors that operations get, if somebody wants them."""
        self.arguments: dict[int, list[Tensor]] = {}
        """These tensors, by the numbers of operations that are wanted; all else may be freed."""
        self.wanted: Container[int] | None = None  # which are all of them
        self.operations: list[Any] = []
        """Functions that were called, and plain values that they were called with."""

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
        self._constants, self._buffers = None, ()
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
        kwargs = kwargs or {}
        if self._is_over:
            return func(*args, **kwargs)
        tracked, is_tracked, number = self._tracked, False, len(operations := self.operations)
        tensors: list[Tensor] = []
        operations += (func,)
        for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in _PLAIN:
                operations += (_APART[value],) if value in _APART else (value,)
                continue
            if kind in _ROWS and _PLAIN.issuperset(map(type, value)):  # as strides are
                operations.append(len(value))
                operations.extend(map(_APART.get, value, value))
                continue
            if tracked and id(value) in tracked:
                is_tracked = True
            elif kind is not Tensor:
                _note_values(value, operations)
                is_tracked = is_tracked or are_among((value,), tracked)
            if kind is Tensor:
                tensors += (value,)
            elif self.kinds is not None:
                tensors += tensors_in((value,))
        if func in TELLING:
            self._note_telling(func, args, kwargs)
        if self.kinds is not None:
            self.kinds += map(_KIND, tensors)
            if self.wanted is None or number in self.wanted:
                self.arguments[number] = tensors
        if is_tracked or func in self._noticed:
            result = self.call(number, func, args, kwargs, is_tracked)
        else:  # the usual case
            is_large = func in PULLED and args and args[0].numel() >= FEWEST_PULLED
            result = (PULLED[func] if is_large and self.pulls_many else func)(*args, **kwargs)
        kind = type(result)
        if not result.dtype.is_floating_point if kind is Tensor else kind in (tuple, list):
            self._known_integers.note(args, kwargs, result)
        if self._listener is not None:
            self._listener.hear(OperationCall(number, func, args, kwargs, result))
        return result

    @property
    def _known_integers(self) -> ConstantIntegers:
        """Made where the first one is met: most modules have none."""
        if self._constants is None:
            self._constants = ConstantIntegers(self._buffers)
        return self._constants

    def _note_telling(
        self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> None:
        """Note what numbers tell: what Python does next, or where an operation moves others."""
        self.reads_values |= func in READING
        self.reads_values |= func in LEAVING and torch.is_grad_enabled()
        if func in BARE:
            self._known_integers.forget()
        chooses = func in CHOOSING and is_chosen_by_tensor(args)
        if chooses or func in MOVING:
            others = args[1:2] if chooses else (*args[1:], *kwargs.values())
            is_told = func not in MOVING_BY_ITSELF
            numbers = self._known_integers.numbers_in(others) if is_told else None
            self.operations.append(numbers)
            self.moves_samples = True
            self.moves_unseen |= numbers is None


def are_among(values: Iterable[Any], tracked: Ids, without: Ids = ()) -> bool:
    """Is a tracked tensor among values, or in lists of them? Those ``without`` do not count."""
    for value in values:
        if id(value) in tracked and id(value) not in without:
            return True
        is_list = type(value) is not Tensor and isinstance(value, tuple | list)
        if is_list and are_among(value, tracked, without):
            return True
    return False


def _note_values(value: Any, operations: list[Any]) -> None:
    """Note the plain values that an argument holds, at any depth, and in which containers."""
    kind = type(value)
    if kind in _PLAIN:
        operations.append(_APART.get(value, value))
    elif isinstance(value, tuple | list):
        operations.append(len(value))
        for item in value:
            _note_values(item, operations)
    elif kind is slice:
        operations.append("slice")
        _note_values((value.start, value.stop, value.step), operations)
    elif isinstance(value, Number):  # NumPy has some of its own
        operations.append(_APART.get(value, value))


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
