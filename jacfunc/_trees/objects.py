"""Objects that hold tensors, taken apart into items and attributes without a call of their code."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from types import (
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

from torch import Tensor, nn

MOST, DEEPEST = 10_000, 30
"""An object that leads to more things, or goes deeper (it may lead to itself), is no tree."""

_BASES: tuple[Any, ...] = (object, SimpleNamespace, tuple, list, dict, OrderedDict)
"""The built-in types from which a class that is taken apart may come."""
_STATIC = "jacfunc", "builtins"
"""Packages whose classes are taken as they are: our own hold tensors that are no leaves."""
_HEAP = 1 << 9
"""Python's flag of types that are not built in."""


class Attribute(NamedTuple):
    """The name of an attribute, among the keys of items."""

    name: str


_OWN = Attribute("__dict__")


def holds_tensors(thing: object) -> bool:
    """Is it an object with tensors in its attributes or items, at any depth?"""
    pending: list[tuple[Any, int]] = [(thing, 0)]
    count, holds = 0, False
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > MOST or depth > DEEPEST:
            return False
        if isinstance(item, Tensor):
            holds = True
        elif type(item) in _BASES[2:]:
            inner: Any = item.values() if isinstance(item, dict) else item
            pending += [(value, depth + 1) for value in inner]
        elif can_hold(_kind(item)):
            pending += [(value, depth + 1) for value in parts(item)[1]]
    return holds


@cache
def can_hold(kind: Any) -> bool:
    """Can instances be taken apart, and put together again without their constructor?

    Modules and whatever can be called do something with what they hold, and are left alone.
    """
    if kind.__module__.partition(".")[0] in _STATIC and kind is not SimpleNamespace:
        return False
    if issubclass(kind, nn.Module | type) or hasattr(kind, "__torch_function__"):
        return False
    return _base(kind) in _BASES and not any("__call__" in each.__dict__ for each in kind.__mro__)


@cache
def _base(kind: Any) -> Any:
    """The built-in type that a class comes from."""
    return next(each for each in kind.__mro__ if not each.__flags__ & _HEAP)


def _kind(thing: Any) -> Any:
    """The class of a thing, of which type checkers do not know that it can be hashed."""
    return type(thing)


def slots_of(thing: object) -> dict[str, Any]:
    """By name, the descriptors of an object's attributes that do not lie in its ``__dict__``."""
    return _slots(_kind(thing))


@cache
def _slots(kind: Any) -> dict[str, Any]:
    tables = [vars(each) for each in reversed(kind.__mro__) if "__slots__" in vars(each)]
    named = [pair for table in tables for pair in table.items()]
    return {name: x for name, x in named if isinstance(x, MemberDescriptorType)}


def parts(thing: Any) -> tuple[list[Any], list[Any]]:
    """Keys of the items, and names of the attributes, and all values in this order."""
    base = _base(_kind(thing))
    if issubclass(base, dict):
        items = {key: base.__getitem__(thing, key) for key in base.__iter__(thing)}
    else:
        items = dict(enumerate(base.__iter__(thing))) if base in (tuple, list) else {}
    named = dict(_attributes(thing))
    return [*items, *named], [*items.values(), *named.values()]


def _attributes(thing: Any) -> Iterator[tuple[Attribute, Any]]:
    for name, slot in slots_of(thing).items():
        try:
            yield Attribute(name), slot.__get__(thing)
        except AttributeError:
            continue  # it is not set
    own = getattr(thing, "__dict__", {})
    if own is thing:  # some dicts are their own attributes
        yield _OWN, None
    else:
        yield from ((Attribute(name), value) for name, value in own.items())


def put_together(kind: Any, keys: Sequence[Any], values: Iterable[Any]) -> Any:
    """An object of a class that has these parts; its constructor is not called."""
    base = _base(kind)
    pairs = list(zip(keys, values, strict=True))
    items = [pair for pair in pairs if not isinstance(pair[0], Attribute)]
    new = base.__new__(kind, [value for _, value in items]) if base is tuple else base.__new__(kind)
    if base is list:
        base.extend(new, [value for _, value in items])
    elif issubclass(base, dict):
        for key, value in items:
            base.__setitem__(new, key, value)
    for attribute, value in pairs[len(items) :]:
        object.__setattr__(new, attribute.name, new if attribute == _OWN else value)
    return new


def referred(thing: Any) -> Iterator[Any]:
    """What a thing refers to: items, attributes, what a function closes over or is bound to."""
    if isinstance(thing, FunctionType):
        yield from _referred_by_function(thing)
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from thing
    elif not isinstance(thing, type | ModuleType):
        own = attributes_of(thing)
        yield from own.values() if type(own) is dict else ()


def attributes_of(thing: object) -> Any:
    """The dict of an object's attributes, without a call of its ``__getattribute__``."""
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None


def _referred_by_function(function: FunctionType) -> Iterator[Any]:
    """What a function of Python closes over, its defaults, and globals that it names.

    Of torch's and our own functions the globals are left out.
    """
    cells = [cell for cell in function.__closure__ or () if cell != CellType()]
    yield from (cell.cell_contents for cell in cells)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    table = function.__globals__
    if not f"{table.get('__name__')}.".startswith(("torch.", "jacfunc.")):
        names = [name for code in codes_in(function.__code__) for name in code.co_names]
        yield from (table[name] for name in names if name in table)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code, and those of inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)
