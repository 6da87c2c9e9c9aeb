"""Which modules a function may call, read from the objects that it refers to."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

from torch import Tensor, nn

from jacfunc._remembered import Remembered
from jacfunc._trees import referred

DEEPEST, MOST = 6, 300
"""The longest chain of references from the function, and the most objects that are looked at."""

_ENDS = (Tensor, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float)


def reaches_module(func: Any) -> bool:
    """May the function call a module, or write into one as ``torch.func.functional_call`` does?

    Then it must run alone: another thread may have put other parameters into that module. The
    answer is remembered.

    Example:
        >>> import torch
        >>> from jacfunc._calls.reach import reaches_module
        >>> model = torch.nn.Linear(1, 1)
        >>> reaches_module(torch.sin), reaches_module(model.forward)
        (False, True)
    """
    return _reaching().get_or_make(func, None, lambda: bool(modules_of(func)))


@cache
def _reaching() -> Remembered[bool]:
    return Remembered()


def modules_of(func: Any) -> list[nn.Module]:
    """The modules that a function refers to, each once, without those inside them.

    Example:
        >>> import torch
        >>> from jacfunc._calls.reach import modules_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1))
        >>> modules_of(model.forward) == [model]
        True
    """
    things = islice(_things(func, 0, set()), MOST)
    return [thing for thing in things if isinstance(thing, nn.Module)]


def _things(thing: Any, depth: int, visited: set[int]) -> Iterator[Any]:
    """A thing and all that it refers to, each once."""
    if depth > DEEPEST or thing is None or isinstance(thing, _ENDS) or id(thing) in visited:
        return
    visited.add(id(thing))
    yield thing
    for part in () if isinstance(thing, nn.Module) else referred(thing):
        yield from _things(part, depth + 1, visited)
