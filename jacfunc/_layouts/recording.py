"""Records the operations that a function calls, and what they may depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._layouts.traces import Listener, OperationCall
from jacfunc._torch import PULLED, function_modes

Args: TypeAlias = tuple[Any, ...]

_PLAIN = frozenset({bool, int, float, str, torch.dtype, type(None), type(...)})

_APART: dict[Any, str] = {-2: "minus two"}
"""Python gives -1 and -2 the same hash: in signatures, which are hashes, a word stands for -2."""

_BY_INDEX = (
    *("gather", "take", "take_along_dim", "index_select", "index_add", "index_copy", "index_put"),
    *("index_fill", "index_reduce", "masked_select", "masked_scatter", "nonzero", "argwhere"),
    *("scatter", "scatter_add", "scatter_reduce", "unique", "unique_consecutive", "bincount"),
    *("multinomial", "histc", "put", "index_add_", "index_copy_", "index_put_", "index_fill_"),
    *("index_reduce_", "masked_scatter_", "scatter_", "scatter_add_", "scatter_reduce_", "put_"),
)
MOVING: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name) for name in _BY_INDEX for place in (torch, Tensor) if hasattr(place, name)
)
"""Operations that move numbers to where other numbers say, maybe to other samples."""

FEWEST_PULLED = 2**11
"""From so many numbers on it pays to look for an operation whose pullback is faster."""

_READ_BY = (
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    *("__format__", "__repr__", "item", "tolist"),
    *("equal", "allclose", "is_nonzero"),
)
READING: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name) for name in _READ_BY for place in (torch, Tensor) if hasattr(place, name)
)
"""Reads of numbers by Python, which may choose by them what to do."""

_LEFT_BY = "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "data_ptr"
LEAVING: frozenset[Any] = frozenset(getattr(Tensor, name) for name in _LEFT_BY)
"""Ways to NumPy, and to bare memory. What is computed there has no derivative, so if a graph is
recorded the function reads the numbers to choose by them. If none is, as in a function with a
backward pass of its own, it may compute with them."""

CHOOSING: frozenset[Callable[..., Any]] = frozenset([Tensor.__getitem__, Tensor.__setitem__])
"""Operations that choose entries by numbers, which may be those in a tensor."""

TELLING = MOVING | READING | LEAVING | CHOOSING


class WhatWasSeen(Protocol):
    """What was seen of the operations of an evaluation, as :class:`OperationRecorder` sees it."""

    @property
    def signature(self) -> int: ...

    @property
    def moves_samples(self) -> bool: ...

    @property
    def reads_values(self) -> bool: ...


class OperationRecorder(TorchFunctionMode):
    """A context that numbers the operations of a function, from where the user's part begins.

    Args:
        listener: is told of all operations, if there is one.
        noticed: operations that :meth:`call` sees; all others are called as they are.
        tracked: identities of tensors; operations with one of these are seen as well.
    """

    def __init__(
        self,
        listener: Listener | None = None,
        noticed: Collection[Any] = (),
        tracked: Container[int] = (),
    ) -> None:
        super().__init__()
        self._listener, self._noticed, self._tracked = listener, noticed, tracked
        self.arguments: dict[int, list[Tensor]] | None = None
        """The tensors that operations get, by the numbers of these, if somebody wants them."""
        self.operations: list[Any] = []
        """Functions that were called, and plain values that they were called with."""
        self.moves_samples = False
        """Has the function moved numbers to where other numbers say?"""
        self.reads_values = False
        """Did Python read numbers?"""
        self.pulls_many = True
        """Are many cotangents pulled back at once? For one, torch's own products are faster."""
        self._is_over = False

    @property
    def signature(self) -> int:
        """Equal for evaluations that called the same functions with the same numbers and words."""
        return hash(tuple(self.operations))

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

    def begin(self) -> None:
        """Forget all: only what follows is part of the user's function."""
        self.operations.clear()
        if self.arguments is not None:
            self.arguments.clear()
        if self._listener is not None:
            self._listener.begin()
        self._is_over = False

    def end(self) -> None:
        """Count no operations from here on."""
        self._is_over = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Args = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # called for every operation: as short as it can be
        kwargs = kwargs or {}
        if self._is_over:
            return func(*args, **kwargs)
        operations, tracked, is_tracked = self.operations, self._tracked, False
        number = len(operations)
        tensors: list[Tensor] = []
        operations.append(func)
        for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in _PLAIN:
                operations.append(_APART.get(value, value))
                continue
            if id(value) in tracked:
                is_tracked = True
            elif kind is not Tensor:
                _note_values(value, operations)
                is_tracked = is_tracked or are_among((value,), tracked)
            if kind is Tensor:
                tensors.append(value)
            elif self.arguments is not None:
                tensors += tensors_in((value,))
        if func in TELLING:
            self.reads_values |= func in READING
            self.reads_values |= func in LEAVING and torch.is_grad_enabled()
            self.moves_samples |= func in MOVING or (
                func in CHOOSING and _is_chosen_by_tensor(args)
            )
        if self.arguments is not None:
            self.arguments[number] = tensors
        if is_tracked or func in self._noticed:
            result = self.call(number, func, args, kwargs, is_tracked)
        else:  # the usual case
            is_large = func in PULLED and args and args[0].numel() >= FEWEST_PULLED
            result = (PULLED[func] if is_large and self.pulls_many else func)(*args, **kwargs)
        if self._listener is not None:
            self._listener.hear(OperationCall(number, func, args, kwargs, result))
        return result


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from tensors_in(value)


def are_among(values: Iterable[Any], tracked: Container[int], without: Container[int] = ()) -> bool:
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
        for end in (value.start, value.stop, value.step):
            _note_values(end, operations)
    elif isinstance(value, Number):  # NumPy has some of its own
        operations.append(_APART.get(value, value))


def _is_chosen_by_tensor(args: Args) -> bool:
    """Does a call choose entries of a tensor by the numbers in another one?"""
    items = args[1] if isinstance(args[1], tuple) else args[1:2]
    return any(isinstance(item, Tensor | list) for item in items)


def begins() -> None:
    """Tell recorders that operations are counted from here, where the user's function begins.

    What is done before, to lend a module, may change from one evaluation to the next.
    """
    for recorder in recorders():
        recorder.begin()


def ends() -> None:
    """Tell recorders that the user's function is over."""
    for recorder in recorders():
        recorder.end()


def recorders() -> list[OperationRecorder]:
    """The recorders around this call, if torch would show them an operation now."""
    modes = function_modes() if torch._C._is_torch_function_mode_enabled() else ()
    return [mode for mode in modes if isinstance(mode, OperationRecorder)]


def users_modes() -> tuple[type, ...]:
    """The classes of modes of others around, which may change what operations return."""
    kinds = map(type, function_modes())
    return tuple([x for x in kinds if not x.__module__.startswith(("jacfunc.", "torch."))])
