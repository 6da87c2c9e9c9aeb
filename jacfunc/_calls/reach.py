"""Which functions may call a module: read from what they close over, without running them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from jacfunc._remembered import Remembered

DEEPEST, MOST = 6, 300
"""Steps from the function, and things that are looked at in all."""

_ENDS = (Tensor, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float)


def reaches_module(func: Any) -> bool:
    """May it call a module, or write into one, as ``torch.func.functional_call`` does?

    Another thread may be lending that module other parameters at that time.

    Example:
        >>> import torch
        >>> from jacfunc._calls.reach import reaches_module
        >>> model = torch.nn.Linear(1, 1)
        >>> reaches_module(torch.sin), reaches_module(model.forward)
        (False, True)
    """
    return _reaching().get_or_make(func, None, lambda: _reaches_module(func))


@cache
def _reaching() -> Remembered[bool]:
    return Remembered()


def _reaches_module(func: Any) -> bool:
    return any(isinstance(thing, nn.Module) for thing in islice(_things(func, 0, set()), MOST))


def _things(thing: Any, depth: int, met: set[int]) -> Iterator[Any]:
    """It, and what it refers to, once each."""
    if depth > DEEPEST or thing is None or isinstance(thing, _ENDS) or id(thing) in met:
        return
    met.add(id(thing))
    yield thing
    for part in _parts(thing):
        yield from _things(part, depth + 1, met)


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # nothing has been put into it yet
                continue
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        if not f"{thing.__globals__.get('__name__')}.".startswith(("torch.", "jacfunc.")):
            names = _names(thing.__code__)
            yield from (thing.__globals__[name] for name in names if name in thing.__globals__)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.values()
    else:
        yield from getattr(thing, "__dict__", {}).values()


def _names(code: types.CodeType) -> Iterator[str]:
    """Of what it looks up, and what functions inside it do."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
