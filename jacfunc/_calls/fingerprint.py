"""A key of a function's code and settings, which is the same in the next process."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEEPEST = 8
PLAIN_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)

FIRST_NAMES = {"jacfunc._calls.flat_call.": "jacfunc._flat."}
"""Names as they are in keys of cache files that were written before a class moved."""


def fingerprint(func: object) -> str:
    """Sixteen hex digits that are equal for equal code with equal shapes and settings in closures.

    Numbers in tensors do not count, nor do the globals that a function uses.

    Example:
        >>> from jacfunc._calls.fingerprint import fingerprint
        >>> def power(n):
        ...     return lambda x: x ** n
        >>> fingerprint(power(2)) == fingerprint(power(2)) != fingerprint(power(3))
        True
    """
    digest = hashlib.sha256()
    for part in _parts(func, 0):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _parts(thing: Any, depth: int) -> Iterator[str]:
    """Strings that tell a thing from others: of itself, then of its parts."""
    yield type(thing).__qualname__
    if depth > DEEPEST:
        return
    if thing is None or isinstance(thing, PLAIN_VALUES):
        yield repr(thing)
    elif isinstance(thing, Tensor):
        yield f"{tuple(thing.shape)} {thing.dtype} {thing.device} {thing.requires_grad}"
    elif isinstance(thing, types.CodeType):
        yield thing.co_code.hex()
        yield repr(thing.co_names)
        yield from _each(thing.co_consts, depth)
    elif isinstance(thing, types.FunctionType):
        yield f"{thing.__module__}.{thing.__qualname__}"
        yield from _parts(thing.__code__, depth)
        cells = inspect.getclosurevars(thing).nonlocals if thing.__closure__ else {}
        yield from _each((thing.__defaults__, thing.__kwdefaults__, cells), depth)
    elif isinstance(thing, types.MethodType):
        yield from _each((thing.__func__, thing.__self__), depth)
    elif isinstance(thing, nn.Module):
        yield from _parts(dict(thing.named_parameters()), depth)
        yield from _parts(dict(thing.named_buffers()), depth)
        yield repr(thing) + str([part.training for part in thing.modules()])
        # two local classes of one name may do different things
        kinds = dict.fromkeys(type(part) for part in thing.modules())
        yield from _each([getattr(kind.forward, "__code__", None) for kind in kinds], depth)
    elif isinstance(thing, Mapping):
        yield from _each(thing, depth)
        yield from _each(thing.values(), depth)
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from _each(thing, depth)
    else:
        name = f"{type(thing).__module__}.{getattr(thing, '__qualname__', '')}"
        yield FIRST_NAMES.get(name, name)
        # functools.partial and FlatCall hold the function in these attributes
        inner = [getattr(thing, name, None) for name in ("func", "args", "keywords")]
        yield from _each(inner, depth)


def _each(things: Any, depth: int) -> Iterator[str]:
    for thing in things:
        yield from _parts(thing, depth + 1)
