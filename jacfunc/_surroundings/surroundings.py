"""What a function computes with beside its arguments: all that it refers to.

A trace holds for a function as it was. So each call compares what the function refers to with what
that was, object by object, which takes a few microseconds for a small network.
"""

from __future__ import annotations

import os
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from enum import Enum
from typing import Any

from torch import Tensor, nn

from jacfunc._arguments import are_plain
from jacfunc._calls import home_of, is_installed, places_of, reads_by_text
from jacfunc._errors import Nameless
from jacfunc._surroundings.outside import check_inside, check_names
from jacfunc._surroundings.things import (
    HOOKS_OF_ALL,
    asked,
    in_slots,
    is_array,
    is_data,
    is_harmless,
    is_of_class,
    is_value,
    parts_of,
    texts_of,
    value_of,
)
from jacfunc._surroundings.watched import Watched
from jacfunc._torch import Graphs

_REPLACED = types.FunctionType, types.BuiltinFunctionType
"""What others replace in an installed module: functions."""

MOST = 50_000
"""A function that refers to more things than this is refused."""


class Surroundings:
    """All that a function refers to at one moment; of jacfunc's derivatives, what they are of.

    Args:
        func: the function.

    Raises:
        Nameless: if it refers to something that can change unseen.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self._watched = Watched()
        self.tensors = self._watched.tensors
        self._numbers: dict[int, int] = {}
        self._every: list[Any] = []  # kept alive, so that no other object gets the identity of one
        self._told: list[Any] = []
        hooks = [(table, "hooks of all modules") for table in HOOKS_OF_ALL]
        self._waiting: deque[tuple[Any, str]] = deque([(func, "func"), *hooks])
        while self._waiting:
            self._visit(*self._waiting.popleft())
        self.kind = tuple(self._told)
        """Equal for surroundings for which one trace holds, whatever numbers tensors hold."""
        self._watched.keep()

    def are_current(self) -> bool:
        """Does the function refer to the same objects as then?"""
        return self._watched.are_same()

    def _visit(self, thing: Any, path: str) -> None:
        if is_value(thing):
            self._told += [type(thing), value_of(thing)]
            if isinstance(thing, Enum) and self._is_new(thing):  # it may have attributes, too
                self._look_into_object(thing, path)
            return
        if not self._is_new(thing):
            return
        if len(self._every) > MOST:
            raise Nameless(f"func must refer to {MOST} objects at most, got more. Pass it tensors.")
        self._told.append(type(thing))
        looks = (look for kind, look in self._looks.items() if isinstance(thing, kind))
        next(looks, self._look_into_rest)(thing, path)

    def _is_new(self, thing: Any) -> bool:
        """Tell its number. Has it none yet?"""
        number = self._numbers.setdefault(id(thing), len(self._every))
        self._told.append(number)
        if number < len(self._every):
            return False
        self._every.append(thing)
        return True

    @property
    def _looks(self) -> Mapping[Any, Callable[[Any, str], None]]:
        return {
            Tensor: self._look_at_tensor,
            types.FunctionType: self._look_into_function,
            types.CellType: self._look_into_cell,
            types.ModuleType: self._look_into_module,
            type: self._look_into_class,
            dict: self._look_into_dict,
            (list, deque): self._look_into_list,
            tuple: self._look_into_items,
            (set, frozenset): self._look_into_set,
            (weakref.ref, ContextVar): self._look_behind,
        }

    def _look_into_rest(self, thing: Any, path: str) -> None:
        if is_harmless(thing):
            self._told.append(id(thing))
        elif (parts := parts_of(thing)) is not None:
            self._told.append(getattr(thing, "__qualname__", None))
            for name in parts:
                self._later(getattr(thing, name, None), f"{path}.{name}")
        elif is_array(thing):
            self._told.append(value_of(thing))
            self._watched.copied.append(thing)
            self._look_beside(thing, path)
        elif (texts := texts_of(thing)) is not None:
            self._told += texts
            self._look_into_object(thing, path)
        else:
            raise Nameless(
                "func must refer to tensors, modules, functions and plain values, got "
                f"{type(thing).__name__} at {path}, which may change unseen. Pass what it holds "
                "as an argument, or call the derivative as it is."
            )

    def _later(self, thing: Any, path: str) -> None:
        self._waiting.append((thing, path))

    def _look_behind(self, thing: Any, path: str) -> None:
        self._watched.asked.append(ask := asked(thing))
        self._later(ask(), path)

    def _look_at_tensor(self, tensor: Tensor, path: str) -> None:
        if not are_plain([tensor]) and not isinstance(tensor, nn.Buffer):
            raise Nameless(
                f"func must refer to plain tensors, got {type(tensor).__name__} at {path}. "
                "Call the derivative as it is."
            )
        self.tensors.append(tensor)
        self._later(Graphs.hooks_of(tensor), f"{path}, a hook")
        self._look_beside(tensor, path)

    def _look_into_function(self, func: types.FunctionType, path: str) -> None:
        self._told.append(func.__code__)
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            self._later(cell, name)
        self._later(func.__defaults__, f"{path}.__defaults__")
        self._later(func.__kwdefaults__, f"{path}.__kwdefaults__")
        if is_installed(home_of(func)):
            return
        self._watched.functions.append(func)
        self._look_beside(func, path)
        check_names(func, path)
        for table, name in places_of(func):
            self._look_up(table, name, func)

    def _look_up(self, table: dict[str, Any], name: str, func: types.FunctionType) -> None:
        """Look at what a function finds under a name: in an installed module at settings alone."""
        thing = os.environ if table.get(name) is os.getenv else table.get(name)
        check_inside(thing, func.__name__)
        is_own = table is func.__globals__ or not is_installed(str(table.get("__name__")))
        if is_own or is_data(thing) or isinstance(thing, _REPLACED):
            self._watched.looked_up.append((table, name))
            if name in table and (reads_by_text(func) or not isinstance(thing, types.ModuleType)):
                self._later(thing, name)

    def _look_into_module(self, module: types.ModuleType, path: str) -> None:
        """Look at all that it has, as nobody knows what of it will be used."""
        self._told.append(module.__name__)
        if not is_installed(module.__name__):
            self._watched.dicts.append(vars(module))
            for name, thing in [*vars(module).items()]:
                if not name.startswith("__"):
                    self._told.append(name)
                    self._later(thing, f"{path}.{name}")

    def _look_into_cell(self, cell: types.CellType, path: str) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:
            self._told.append("empty")
            return
        self._watched.cells.append(cell)
        if isinstance(contents, types.ModuleType):  # the code names what it uses of it
            self._is_new(contents)
        else:
            self._later(contents, path)

    def _look_into_class(self, kind: type, path: str) -> None:
        self._told.append(kind)
        if is_installed(home_of(kind)):
            return
        self._watched.classes.append(kind)
        for name, thing in vars(kind).items():
            if is_of_class(name, thing):
                self._later(thing, f"{path}.{name}")
        for base in (*kind.__bases__, type(kind)):
            self._later(base, base.__name__)

    def _look_into_dict(self, table: dict[Any, Any], path: str) -> None:
        (self._watched.dicts if table else self._watched.empty).append(table)
        self._told.append(len(table))
        for key, value in [*table.items()]:
            self._later(key, f"{path}, a key")
            self._later(value, f"{path}[{key!r}]" if is_value(key) else path)
        self._look_beside(table, path)

    def _look_into_list(self, things: Any, path: str) -> None:
        (self._watched.lists if things else self._watched.empty).append(things)
        self._look_into_items(things, path)

    def _look_into_items(self, things: Any, path: str) -> None:
        self._told.append(len(things))
        for number, thing in enumerate([*things]):
            self._later(thing, f"{path}[{number}]")
        self._look_beside(things, path)

    def _look_into_set(self, things: Any, path: str) -> None:
        (self._watched.copied if things else self._watched.empty).append(things)
        values = [thing for thing in things if is_value(thing)]
        self._told.append(frozenset(map(value_of, values)))
        for thing in [*things]:
            if not is_value(thing):
                self._later(thing, path)
        self._look_beside(things, path)

    def _look_beside(self, things: Any, path: str) -> None:
        """Look at attributes of a container, a function or a tensor, or those of its class."""
        if getattr(things, "__dict__", None) or not is_installed(home_of(type(things))):
            self._look_into_object(things, path)

    def _look_into_object(self, thing: Any, path: str) -> None:
        self._later(type(thing), type(thing).__name__)
        attributes = in_slots(thing)
        if attributes:
            self._watched.slotted.append(thing)
        if hasattr(thing, "__dict__"):
            self._watched.objects.append(thing)
            attributes |= vars(thing)
        for name, value in [*attributes.items()]:
            self._told.append(name)
            self._later(value, f"{path}.{name}")
