"""What kinds of things a function may refer to, and how one tells that they have changed."""

from __future__ import annotations

import _thread
import array
import functools
import io
import logging
import os
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from typing import Any

import torch

from jacfunc._calls import home_of, is_installed, is_ours
from jacfunc._torch import Graphs
from jacfunc._trees import slots_of

PLAIN = frozenset(
    {type(None), bool, int, str, bytes, range, type(...), type(NotImplemented)}
    | {torch.dtype, torch.layout, torch.memory_format, torch.device, torch.Size}
)
"""Types of values that never change, and are equal only if they mean the same."""

HARMLESS = (
    *(logging.Logger, io.IOBase, _thread.LockType, type(_thread.RLock()), random.Random),
    *Graphs.OPERATORS,
    *(torch.Generator, types.CodeType),
)
"""Types of what changes nothing in a trace: draws are seen there, and operators are called."""

HOOKS_OF_ALL = [
    table
    for name, table in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(table, dict)
]
"""Tables of the hooks that all modules have."""

HARMLESS_OF_NUMPY = frozenset({"ufunc", "Generator", "RandomState", "_ArrayFunctionDispatcher"})

PARTS: dict[Any, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    types.BuiltinFunctionType: ("__self__",),
    types.MethodWrapperType: ("__self__",),
    types.GenericAlias: ("__origin__", "__args__"),
    slice: ("start", "stop", "step"),
    functools.partial: ("func", "args", "keywords"),
    property: ("fget",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools.cached_property: ("func",),
    type(cache(len)): ("__wrapped__",),
}
"""Things that are made of others once and for all."""

MOST_BYTES = 2**20
"""Arrays of so many bytes are compared at each call."""

MOST_DATA = 1000
"""Containers of so many values are settings of an installed module; larger ones are tables."""


TEXTS = (int, float, complex, str, bytes)
"""Types of numbers and texts: a user's class of them has attributes beside."""

_UNSEEN = (
    *(float, tuple, frozenset, type, memoryview, types.MappingProxyType),
    *(weakref.ref, ContextVar),
)
"""Types that are equal by value to some others, and yet are no values."""

_ON_HEAP = 1 << 9
"""The flag of classes that are written in Python."""


def is_value(thing: Any) -> bool:
    """Is it a value that can't change?"""
    kind = type(thing)
    return kind in PLAIN or kind in (float, complex) or isinstance(thing, Enum) or _hashes(kind)


def _hashes(kind: Any) -> bool:
    """Do its objects hold no others, and are they equal by value, as dates and paths are?"""
    own: Any = kind.__hash__
    is_by_identity = own is None or own is object.__hash__
    is_closed = not is_by_identity and is_installed(kind.__module__) and not _has_attributes(kind)
    is_called = any("__call__" in vars(each) for each in kind.__mro__)
    return is_closed and not is_called and (_is_number(kind) or not issubclass(kind, _UNSEEN))


def _has_attributes(kind: type) -> bool:
    return bool(kind.__dictoffset__)


def _is_number(kind: Any) -> bool:
    """Is it NumPy's type of one number?"""
    return _is_of_numpy(kind) and "number" in [each.__name__ for each in kind.__mro__]


def value_of(thing: Any) -> Any:
    """What is equal for things that mean the same: values, arrays, sets of values."""
    kind = type(thing)
    if kind in PLAIN:
        return thing
    if isinstance(thing, float | complex) or _is_number(kind):  # 0.0 is equal to -0.0
        return repr(thing)
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, set):
        return frozenset(thing)
    if is_array(thing):
        if _is_of_numpy(kind):
            return str(thing.dtype), thing.shape, thing.tobytes()
        view = memoryview(thing)
        return view.format, view.shape, view.tobytes()
    return thing


def is_array(thing: Any) -> bool:
    """Does it hold numbers, which may change, and few enough to compare them?"""
    if any(each.__name__ == "ndarray" and _is_of_numpy(each) for each in type(thing).__mro__):
        return not thing.dtype.hasobject and thing.nbytes <= MOST_BYTES
    is_buffer = isinstance(thing, bytearray | array.array | memoryview)
    return is_buffer and memoryview(thing).nbytes <= MOST_BYTES


def is_harmless(thing: Any) -> bool:
    """Can't it make a trace stale, whatever becomes of it?"""
    kind = type(thing)
    if hasattr(kind, "__get__") and is_installed(kind.__module__) and not _has_attributes(kind):
        return not isinstance(thing, tuple(PARTS))  # a descriptor, such as a method of list
    by_name = _is_of_numpy(kind) and kind.__name__ in HARMLESS_OF_NUMPY
    return by_name or isinstance(thing, HARMLESS)


def texts_of(thing: Any) -> list[str] | None:
    """What an object is beside its attributes: a number, a text; None if that is hidden."""
    if not (hasattr(thing, "__dict__") or in_slots(thing)):
        return None
    if isinstance(thing, BaseException):
        return [repr(thing.args)]
    if isinstance(thing, TEXTS):
        return [kind.__repr__(thing) for kind in TEXTS if isinstance(thing, kind)]
    bases = [base for base in type(thing).__mro__[:-1] if not base.__flags__ & _ON_HEAP]
    return None if {"builtins", "numpy"} & {base.__module__ for base in bases} else []


def parts_of(thing: Any) -> Iterable[str] | None:
    """Names of what it is made of once and for all; None if it may come to hold others."""
    if is_ours(home_of(type(thing))) and not isinstance(thing, torch.nn.Module):
        return [each.name for each in fields(thing)] if is_dataclass(thing) else _INSIDE
    return next((names for kind, names in PARTS.items() if isinstance(thing, kind)), None)


_INSIDE = ("transformed",)
"""What objects of ours hold of a user's."""


def is_data(thing: Any) -> bool:
    """Is it data that an installed module has, such as a setting?"""
    if isinstance(thing, dict | list | tuple | set | deque) and len(thing) <= MOST_DATA:
        return all(map(is_value, thing.values() if isinstance(thing, dict) else thing))
    return thing is os.environ or isinstance(thing, ContextVar) or is_value(thing)


def asked(thing: Any) -> Callable[[], Any]:
    """What returns the object of a reference, or what a variable of a context is now."""
    return thing if isinstance(thing, weakref.ref) else partial(_current, thing)


def _current(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return None


def is_of_class(name: str, thing: Any) -> bool:
    """Is what a class has under this name looked at? All but tables that Python makes itself."""
    is_called = callable(thing) or hasattr(thing, "__get__")
    is_own = is_called or not name.startswith(("__", "_abc_"))
    return is_own or is_value(thing) or isinstance(thing, torch.Tensor | list | tuple)


def _is_of_numpy(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "numpy"


def in_slots(thing: Any) -> dict[str, Any]:
    """What an object has in its slots."""
    return {name: getattr(thing, name) for name in slots_of(thing) if hasattr(thing, name)}
