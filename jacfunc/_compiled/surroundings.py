"""What a function computes with beside its arguments: all that it refers to.

A trace holds for a function as it was. So each call compares what the function refers to with what
that was, object by object, which takes a few microseconds for a small network.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from jacfunc._arguments import are_plain
from jacfunc._compiled.things import (
    PARTS,
    home_of,
    is_array,
    is_harmless,
    is_installed,
    is_ours,
    is_value,
    names_in,
    slots_of,
    value_of,
)
from jacfunc._compiled.watched import Watched
from jacfunc._errors import Nameless

MOST = 50_000
"""So many things are looked at; who refers to more is refused."""


class Surroundings:
    """All that a function refers to at one moment; of jacfunc's derivatives, what they are of.

    Args:
        func: the function.

    Raises:
        Nameless: if it refers to something that can change unseen.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.tensors: list[Tensor] = []
        self._watched = Watched()
        self._numbers: dict[int, int] = {}
        self._every: list[Any] = []  # of which the identities are not used again
        self._told: list[Any] = []
        self._waiting: deque[tuple[Any, str]] = deque([(func, "func")])
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
            return
        number = self._numbers.setdefault(id(thing), len(self._every))
        self._told.append(number)
        if number < len(self._every):
            return
        self._every.append(thing)
        if number == MOST:
            raise Nameless(f"func must refer to {MOST} objects at most, got more. Pass it tensors.")
        self._told.append(type(thing))
        for kind, look in self._looks.items():
            if isinstance(thing, kind):
                look(thing, path)
                return
        self._look_into_rest(thing, path)

    @property
    def _looks(self) -> Mapping[Any, Callable[[Any, str], None]]:
        return {
            Tensor: self._look_at_tensor,
            types.FunctionType: self._look_into_function,
            types.CellType: self._look_into_cell,
            types.ModuleType: lambda module, _: self._told.append(module.__name__),
            type: self._look_into_class,
            dict: self._look_into_dict,
            (list, deque): self._look_into_list,
            tuple: self._look_into_items,
            (set, frozenset): self._look_into_set,
        }

    def _look_into_rest(self, thing: Any, path: str) -> None:
        parts = next((names for kind, names in PARTS.items() if isinstance(thing, kind)), ())
        if is_harmless(thing):
            self._told.append(id(thing))
        elif parts:
            self._told.append(getattr(thing, "__qualname__", None))
            for name in parts:
                self._later(getattr(thing, name, None), f"{path}.{name}")
        elif is_array(thing):
            self._told.append(value_of(thing))
            self._watched.copied.append(thing)
        elif is_ours(home_of(type(thing))) and not isinstance(thing, nn.Module):
            for name in [each.name for each in fields(thing)] if is_dataclass(thing) else ():
                self._later(getattr(thing, name), f"{path}.{name}")
        elif hasattr(thing, "__dict__") or slots_of(thing):
            self._look_into_object(thing, path)
        else:
            raise Nameless(
                "func must refer to tensors, modules, functions and plain values, got "
                f"{type(thing).__name__} at {path}, which may change unseen. Pass what it holds "
                "as an argument, or call the derivative as it is."
            )

    def _later(self, thing: Any, path: str) -> None:
        self._waiting.append((thing, path))

    def _look_at_tensor(self, tensor: Tensor, path: str) -> None:
        if not are_plain([tensor]) and not isinstance(tensor, nn.Buffer):
            raise Nameless(
                f"func must refer to plain tensors, got {type(tensor).__name__} at {path}. "
                "Call the derivative as it is."
            )
        self.tensors.append(tensor)
        if getattr(tensor, "__dict__", None):
            self._look_into_object(tensor, path)

    def _look_into_function(self, func: types.FunctionType, path: str) -> None:
        self._told.append(func.__code__)
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            self._later(cell, name)
        self._later(func.__defaults__, f"{path}.__defaults__")
        self._later(func.__kwdefaults__, f"{path}.__kwdefaults__")
        if is_installed(home_of(func)):
            return
        self._watched.functions.append(func)
        if vars(func):
            self._look_into_object(func, path)
        names, tables = [*dict.fromkeys(names_in(func.__code__))], [func.__globals__]
        for table in tables:  # which become more
            for name in names:
                self._look_up(table, name, tables)

    def _look_up(self, table: dict[str, Any], name: str, tables: list[dict[str, Any]]) -> None:
        """Look at what a module has under a name; if it is a module, look there, too."""
        thing = table.get(name)
        is_first = table is tables[0]
        if is_first or name in table:
            self._watched.looked_up.append((table, name))
        if name in table:
            self._later(thing, name)
        is_own = isinstance(thing, types.ModuleType) and not is_installed(thing.__name__)
        if is_own and all(vars(thing) is not known for known in tables):
            tables.append(vars(thing))

    def _look_into_cell(self, cell: types.CellType, path: str) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:
            self._told.append("empty")
            return
        self._watched.cells.append(cell)
        self._later(contents, path)

    def _look_into_class(self, kind: type, path: str) -> None:
        self._told.append(kind)
        if is_installed(home_of(kind)):
            return
        self._watched.classes.append(kind)
        for name, thing in vars(kind).items():
            if callable(thing) or not name.startswith(("__", "_abc_")):
                self._later(thing, f"{path}.{name}")
        for base in kind.__bases__:
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

    def _look_beside(self, things: Any, path: str) -> None:
        """Look at the attributes of a container of a class of its own."""
        if getattr(things, "__dict__", None):
            self._look_into_object(things, path)

    def _look_into_object(self, thing: Any, path: str) -> None:
        self._later(type(thing), type(thing).__name__)
        attributes = slots_of(thing)
        if attributes:
            self._watched.slotted.append(thing)
        if hasattr(thing, "__dict__"):
            self._watched.objects.append(thing)
            attributes |= vars(thing)
        for name, value in [*attributes.items()]:
            self._told.append(name)
            self._later(value, f"{path}.{name}")
