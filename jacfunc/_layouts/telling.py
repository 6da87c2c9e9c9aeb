"""Operations that tell by numbers: what Python does next, or where other numbers go."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from jacfunc._torch import is_traced, untracked

_BY_INDEX = (
    *("gather", "take", "take_along_dim", "index_select", "index_add", "index_copy", "index_put"),
    *("index_fill", "index_reduce", "masked_select", "masked_scatter", "scatter", "scatter_add"),
    *("scatter_reduce", "put", "put_", "index_add_", "index_copy_", "index_put_", "index_fill_"),
    *("index_reduce_", "masked_scatter_", "scatter_", "scatter_add_", "scatter_reduce_"),
)
_BY_ITSELF = (
    *("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "multinomial", "histc"),
)


def functions_named(names: Iterable[str]) -> frozenset[Callable[..., Any]]:
    """Functions of torch and methods of tensors with these names."""
    return frozenset(
        getattr(o, name) for name in names for o in (torch, Tensor) if hasattr(o, name)
    )


MOVING_BY_ITSELF = functions_named(_BY_ITSELF)
"""Operations that move the numbers of a tensor to where these numbers themselves say."""

MOVING = MOVING_BY_ITSELF | functions_named(_BY_INDEX)
"""Operations that move numbers to where other numbers say, maybe to other samples."""

MOST_TOLD = 2**14
"""So many numbers that say where others go are compared with those of earlier evaluations."""

_READ_BY = (
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    *("__format__", "__repr__", "item", "tolist"),
    *("equal", "allclose", "is_nonzero"),
)
READING = functions_named(_READ_BY)
"""Reads of numbers by Python, which may choose by them what to do."""

_LEFT_BY = "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "data_ptr"
LEAVING: frozenset[Any] = frozenset(getattr(Tensor, name) for name in _LEFT_BY)
"""Ways to NumPy, and to bare memory. What is computed there has no derivative, so if a graph is
recorded the function reads the numbers to choose by them. If none is, as in a function with a
backward pass of its own, it may compute with them."""

CHOOSING: frozenset[Callable[..., Any]] = frozenset([Tensor.__getitem__, Tensor.__setitem__])
"""Operations that choose entries by numbers, which may be those in a tensor."""

_DATA: Any = Tensor.data
BARE = LEAVING | {_DATA.__get__, _DATA.__set__, Tensor.set_}
"""Ways to write into memory that do not raise the version of a tensor."""

TELLING = MOVING | READING | BARE | CHOOSING

VALUES = frozenset({bool, int, float, str, torch.dtype, torch.device, type(None), type(...)})
"""Kinds of plain values, which are noted as they are."""

APART: dict[Any, str] = {-2: "minus two"}
"""Python gives -1 and -2 the same hash: in signatures, which are hashes, a word stands for -2."""

_PLAIN = bool, int, float, str, type(None), type(...)
_SETTINGS = torch.dtype, torch.device, torch.layout, torch.memory_format


class ConstantIntegers:
    """Integers that no sample has said: buffers of a module, and what is made of these alone.

    What they tell is told of all batches alike, as by numbers that are written into a program.
    """

    def __init__(self, buffers: Iterable[tuple[Tensor, int]]) -> None:
        """Of buffers, with their versions where the evaluation began."""
        self._known: dict[int, tuple[Tensor, int]] | None = {id(x[0]): x for x in buffers}

    def forget(self) -> None:
        """Know nothing from here on: somebody may write into them unseen."""
        self._known = None

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Take in what an operation has made, if that was made of constants."""
        made = [x for x in tensors_in((result,)) if not x.dtype.is_floating_point]
        if made and self._known is not None and self._are_known((*args, *kwargs.values())):
            self._add(made)

    def numbers_in(self, values: Iterable[Any]) -> int | None:
        """Equal for equal integers in values of which some say where others go.

        None if some are no constants, or can't be read. A trace must read none: it is run with
        others.
        """
        with untracked():
            tensors = [x for x in tensors_in(values) if not x.dtype.is_floating_point]
            if is_traced() or sum(x.numel() for x in tensors) > MOST_TOLD:
                return None
            if not all(map(self._is_known, tensors)):
                return None
            try:
                return hash(tuple([(x.shape, x.dtype, x.numpy().tobytes()) for x in tensors]))
            except (RuntimeError, TypeError):  # in a transform, on a GPU, or without NumPy
                return None

    def chosen_in_each(
        self, func: Callable[..., Any], args: tuple[Any, ...], size: int
    ) -> int | None:
        """Equal for choices of entries in each of so many samples; None of any other choice.

        Constants say that each is chosen from, in order. Which of its entries are chosen, other
        numbers say, which each sample has for itself.
        """
        if func is not Tensor.__getitem__ or not chooses_in_each(args, size):
            return None
        first = args[1][:1]
        with untracked():
            return self.numbers_in(first) if are_positions(first[0], size) else None

    def _add(self, tensors: Iterable[Tensor]) -> None:
        assert self._known is not None
        self._known |= {id(x): (x, x._version) for x in tensors if not x.is_inference()}

    def _is_known(self, tensor: Tensor) -> bool:
        """Was it noted, and not written into since?"""
        known = (self._known or {}).get(id(tensor))
        return known is not None and known[1] == tensor._version

    def _are_known(self, values: Iterable[Any]) -> bool:
        """Are all tensors among values, at any depth, such ones?"""
        for value in values:
            if isinstance(value, Tensor):
                is_known = self._is_known(value)
            elif isinstance(value, tuple | list):
                is_known = self._are_known(value)
            elif isinstance(value, slice):
                is_known = self._are_known((value.start, value.stop, value.step))
            else:
                is_known = type(value) in _PLAIN or isinstance(value, _SETTINGS)
            if not is_known:
                return False
        return True


def note_values(value: Any, operations: list[Any]) -> None:
    """Note the plain values that an argument holds, at any depth, and in which containers."""
    kind = type(value)
    if kind is Tensor:  # the usual case
        return
    if kind in VALUES:
        operations.append(APART.get(value, value))
    elif isinstance(value, tuple | list):
        operations.append(len(value))
        for item in value:
            note_values(item, operations)
    elif kind is slice:
        operations.append("slice")
        note_values((value.start, value.stop, value.step), operations)
    elif isinstance(value, Number):  # NumPy has some of its own
        operations.append(APART.get(value, value))


def are_among(values: Iterable[Any], tracked: Container[int], without: Container[int] = ()) -> bool:
    """Is a tracked tensor among values, or in lists of them? Those ``without`` do not count."""
    for value in values:
        if id(value) in tracked and id(value) not in without:
            return True
        is_list = type(value) is not Tensor and isinstance(value, tuple | list)
        if is_list and are_among(value, tracked, without):
            return True
    return False


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if type(value) is Tensor or isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from tensors_in(value)


def chooses_in_each(args: tuple[Any, ...], size: int) -> bool:
    """Are entries of a tensor chosen by numbers of so many samples, and what each has of others?"""
    tensor, items = args
    if type(items) is not tuple or len(items) < 2 or tensor.shape[:1] != (size,):
        return False
    if not all(type(x) is Tensor and x.dtype in (torch.int32, torch.int64) for x in items):
        return False
    first, *others = items
    if first.shape != (size, *(1,) * (first.dim() - 1)):
        return False
    dims = first.dim()
    return all(x.dim() < dims or (x.dim() == dims and x.shape[0] in (1, size)) for x in others)


def are_positions(tensor: Tensor, size: int) -> bool:
    """Are these the numbers of so many samples, from zero on, in the first dimension?"""
    if tensor.dtype not in (torch.int32, torch.int64) or not tensor.dim():
        return False
    if tensor.shape != (size, *(1,) * (tensor.dim() - 1)):
        return False
    return torch.equal(tensor.flatten(), torch.arange(size, device=tensor.device).to(tensor.dtype))


def is_chosen_by_tensor(args: tuple[Any, ...]) -> bool:
    """Does a call choose entries of a tensor by the numbers in another one?"""
    items = args[1] if isinstance(args[1], tuple) else args[1:2]
    return any(isinstance(item, Tensor | list) for item in items)
