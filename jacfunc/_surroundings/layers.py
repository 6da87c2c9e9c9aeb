"""The code that torch's own layers run, and whether it is still the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from gc import get_referents
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from jacfunc._arguments import are_plain
from jacfunc._calls import home_of, is_installed
from jacfunc._errors import Nameless
from jacfunc._lending import ModuleState, are_same
from jacfunc._surroundings.things import parts_of
from jacfunc._torch import Graphs
from jacfunc._trees import codes_in

_LAYERS = "torch.nn.modules."
_VALUES = frozenset({bool, int, float, str, type(None)})
_AUTHORS = frozenset({"torch", "pybind11_builtins", *sys.stdlib_module_names}) - {"unittest"}
"""Torch, and Python but for its mocks: what these have written reads nothing of a user's."""


class LayerCode:
    """The code of torch's that a module runs, if it runs no other.

    Args:
        state: the module.

    Raises:
        Nameless: if code of others may run in it, or is told of it.
    """

    def __init__(self, state: ModuleState) -> None:
        tensors = (*state.params.values(), *state.buffers.values())
        is_of_own = {*map(id, tensors)}.issuperset(map(id, state.point.values()))
        if state.beside or state.is_copy or not (is_of_own and are_plain(tensors)):
            raise Nameless("an evaluation gets other tensors than plain ones of the module")
        kinds = set[type]()
        self._lists = list[list[Any]]()
        for part in state.parts.values():
            kinds.add(kind := type(part.module))
            if part.has_hooks or part.is_scripted or not _is_of_torch(kind):
                raise Nameless(f"code of others may run in {kind.__name__}")
            for key, value in part.own.items():
                if hasattr(kind, key) or not _is_plain(value):
                    raise Nameless(f"nothing tells what {key!r} of {kind.__name__} leads to")
                self._lists += [value] if type(value) is list else []
        self._entries = [*map(list.copy, self._lists)]
        own = vars(torch_module).items()
        self._hooks = [x for name, x in own if name.startswith("_global_") and type(x) is not bool]
        self._spaces = [*_spaces_of(kinds)]
        self._names = [*map(_looked_up_in, self._spaces)]
        if others := [*_by_others(x for names in self._names for x in names.values())]:
            raise Nameless(f"{others[0]!r} stands in the place of code of torch's")
        self._versions, self._is_same = [*map(Graphs.version_of, self._spaces)], True

    def is_as_then(self) -> bool:
        """Does the module run the same code, of which nobody is told?"""
        if any(self._hooks) or self._lists != self._entries:
            return False
        versions = [*map(Graphs.version_of, self._spaces)]
        if versions != self._versions:  # torch has loaded something, or somebody has replaced it
            now = map(_looked_up_in, self._spaces)
            self._versions, self._is_same = versions, all(map(are_same, now, self._names))
        return self._is_same


def _is_of_torch(kind: type) -> bool:
    """Is it a class of layers of torch's own?"""
    name = kind.__module__
    return name.startswith(_LAYERS) and vars(sys.modules[name]).get(kind.__name__) is kind


def _is_plain(value: Any) -> bool:
    """Is it a value, or a row of values?"""
    rows = value if type(value) in (tuple, list) else (value,)
    return _VALUES.issuperset(map(type, rows))


def _spaces_of(kinds: Iterable[type]) -> Iterable[dict[str, Any]]:
    """The dicts in which layers, and what they call there, look up what they call."""
    classes = dict.fromkeys(each for kind in (Tensor, *kinds) for each in kind.__mro__[:-1])
    names = dict.fromkeys([*(x.__module__ for x in classes), torch.__name__, F.__name__])
    spaces = [vars(sys.modules[name]) for name in names]
    for each in classes:  # which show their dicts to the garbage collector alone
        spaces += [table for table in get_referents(vars(each)) if type(table) is dict]
    for thing in [x for space in spaces for x in _looked_up_in(space).values()]:
        if isinstance(thing, FunctionType) and home_of(thing).startswith("torch."):
            spaces.append(thing.__globals__)
        elif isinstance(thing, ModuleType) and _has_kernels(thing):
            spaces.append(vars(thing))
    return {id(space): space for space in spaces}.values()


def _has_kernels(module: ModuleType) -> bool:
    """Is it a part of torch that is written in no file of Python's?"""
    return module.__name__.startswith("torch.") and "__file__" not in vars(module)


def _by_others(things: Iterable[Any]) -> Iterator[Any]:
    """Those of these things that others than torch have written, and what they call of others."""
    pending, seen = [*things], set[int]()
    while pending:
        if id(thing := pending.pop()) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, ModuleType):
            is_own = is_installed(thing.__name__)
        else:
            home = home_of(thing if isinstance(thing, FunctionType | type) else type(thing))
            is_own = home.partition(".")[0] in _AUTHORS
        if not is_own:
            yield thing
        elif isinstance(thing, FunctionType):
            pending += [x for cell in thing.__closure__ or () for x in get_referents(cell)]
        elif not isinstance(thing, type):
            pending += [getattr(thing, name, None) for name in parts_of(thing) or ()]


def _looked_up_in(space: Mapping[str, Any]) -> dict[str, Any]:
    """What layers may look up in a dict, by name."""
    names = _names()
    return {n: x for n, x in space.items() if n in names or (n[:2] == "__" and callable(x))}


@cache
def _names() -> frozenset[str]:
    """All names that torch's layers look up somewhere, of variables and of attributes."""
    spaces = [vars(x) for name, x in [*sys.modules.items()] if name.startswith(_LAYERS)]
    kinds = [x for space in spaces for x in space.values() if isinstance(x, type)]
    every = [x for space in (vars(F), *spaces, *map(vars, kinds)) for x in space.values()]
    functions = [x for x in every if isinstance(x, FunctionType)]
    codes = [code for function in functions for code in codes_in(function.__code__)]
    return frozenset(name for code in codes for name in code.co_names)
