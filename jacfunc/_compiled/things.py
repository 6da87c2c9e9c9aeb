"""What kinds of things a function may refer to, and how one tells that they have changed."""

from __future__ import annotations

import _thread
import array
import functools
import io
import logging
import random
import sys
import types
import weakref
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jacfunc._torch import Graphs

PLAIN = frozenset(
    {type(None), bool, int, str, bytes, range, type(...), type(NotImplemented)}
    | {torch.dtype, torch.layout, torch.memory_format, torch.device, torch.Size}
)
"""Types of values that never change, and are equal only if they mean the same."""

HARMLESS = (
    *(logging.Logger, io.IOBase, _thread.LockType, type(_thread.RLock()), random.Random),
    *Graphs.OPERATORS,
    *(weakref.ref, torch.Generator, types.CodeType),
)
"""Types of what changes nothing in a trace: draws are seen there, and operators are called."""

HARMLESS_OF_NUMPY = frozenset({"ufunc", "Generator", "RandomState", "_ArrayFunctionDispatcher"})

PARTS: dict[Any, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    types.BuiltinFunctionType: ("__self__",),
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


def is_value(thing: Any) -> bool:
    """Is it a value that can't change?"""
    kind = type(thing)
    return kind in PLAIN or kind in (float, complex) or isinstance(thing, Enum) or _hashes(kind)


def _hashes(kind: type) -> bool:
    """Do its objects hold no others, and are they equal by value, as dates and paths are?"""
    own: Any = kind.__hash__
    is_by_identity = own is None or own is object.__hash__
    is_closed = not is_by_identity and is_installed(kind.__module__) and not _has_attributes(kind)
    return is_closed and not issubclass(kind, tuple | frozenset | type | weakref.ref | float)


def _has_attributes(kind: type) -> bool:
    return bool(kind.__dictoffset__)


def value_of(thing: Any) -> Any:
    """What is equal for things that mean the same: values, arrays, sets of values."""
    if isinstance(thing, float | complex):  # 0.0 is equal to -0.0
        return repr(thing)
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, set):
        return frozenset(thing)
    if is_array(thing):
        view = memoryview(thing)
        return view.format, view.shape, view.tobytes()
    return thing


def is_array(thing: Any) -> bool:
    """Does it hold numbers, which may change, and few enough to compare them?"""
    is_numpy = (
        _is_of_numpy(thing) and type(thing).__name__ == "ndarray" and not thing.dtype.hasobject
    )
    if is_numpy or isinstance(thing, bytearray | array.array | memoryview):
        return memoryview(thing).nbytes <= MOST_BYTES
    return False


def is_harmless(thing: Any) -> bool:
    """Can't it make a trace stale, whatever becomes of it?"""
    kind = type(thing)
    if hasattr(kind, "__get__") and is_installed(kind.__module__) and not _has_attributes(kind):
        return not isinstance(thing, tuple(PARTS))  # a descriptor, such as a method of list
    by_name = _is_of_numpy(thing) and type(thing).__name__ in HARMLESS_OF_NUMPY
    return by_name or isinstance(thing, HARMLESS)


def _is_of_numpy(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "numpy"


def home_of(thing: Any) -> str:
    """The name of the module in which a function or a class was written."""
    if isinstance(thing, types.FunctionType):
        return str(thing.__globals__.get("__name__", ""))
    return str(getattr(thing, "__module__", ""))


def is_ours(name: str) -> bool:
    """Is it a module of jacfunc?"""
    return name.partition(".")[0] == "jacfunc"


@cache
def is_installed(name: str) -> bool:
    """Is the module one of Python, torch, jacfunc, or another that was installed?

    What such a module defines does not change.
    """
    if is_ours(name) or name.partition(".")[0] in {"torch", "builtins", *sys.builtin_module_names}:
        return True
    place = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or place is None:
        return False
    parts = Path(place).parts
    is_of_python = Path(place).is_relative_to(Path(io.__file__).parent)
    return is_of_python or "site-packages" in parts or "dist-packages" in parts


def names_in(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes that a code uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def slots_of(thing: Any) -> dict[str, Any]:
    """What an object has in its slots."""
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}
