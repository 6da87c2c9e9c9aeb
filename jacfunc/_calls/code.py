"""What the code of a function says of it: where it was written, and what it names."""

from __future__ import annotations

import dis
import io
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from jacfunc._trees import codes_in

Place = tuple[dict[str, Any], str]
"""A table of a module, and a name under which it may have something."""

_UNNAMED = frozenset({"globals", "eval", "exec", "open", "input", "__import__", "id"})
"""Functions of Python by which a function reads what its code does not name."""
_UNNAMED_METHODS = frozenset({"read_text", "read_bytes", "today"})
"""Methods of files and dates that do so."""


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

    Functions and classes that such a module defines do not change.
    """
    if is_ours(name) or name.partition(".")[0] in {"torch", "builtins", *sys.builtin_module_names}:
        return True
    place = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or place is None:
        return False
    parts = Path(place).parts
    is_of_python = Path(place).is_relative_to(Path(io.__file__).parent)
    return is_of_python or "site-packages" in parts or "dist-packages" in parts


def is_module(thing: Any) -> TypeGuard[types.ModuleType]:
    """Is it a module of Python?"""
    return isinstance(thing, types.ModuleType)


def places_of(func: types.FunctionType) -> Iterator[Place]:
    """Where a function may find what it names: among its globals, and in modules that it names.

    A global is a place even if nothing has that name yet; in modules only names that are there.
    """
    names, tables = _names_in(func), [func.__globals__]
    closed = [_contents(cell) for cell in func.__closure__ or ()]
    tables += map(vars, filter(is_module, (*closed, *_imported_in(func))))
    for table in tables:  # the loop adds tables
        for name in names:
            if table is tables[0] or name in table:
                yield table, name
                thing = table.get(name)
                if is_module(thing) and all(vars(thing) is not known for known in tables):
                    tables.append(vars(thing))


def _names_in(func: types.FunctionType) -> list[str]:
    """Names of globals and attributes that it uses, inner functions included."""
    names: dict[str, None] = {}
    for code in codes_in(func.__code__):
        names |= dict.fromkeys(code.co_names)
        if "getattr" in code.co_names:
            names |= dict.fromkeys([x for x in code.co_consts if isinstance(x, str)])
    return [*names]


def reads_by_text(func: types.FunctionType) -> bool:
    """Does it read attributes, perhaps, under names that its code does not show?"""
    return not {"getattr", "vars", "__dict__"}.isdisjoint(_names_in(func))


def reads_unnamed(func: types.FunctionType) -> str | None:
    """By which function of Python it reads what its code does not name; None if by none."""
    functions = _UNNAMED - func.__globals__.keys()
    for code in codes_in(func.__code__):
        if not (_UNNAMED | _UNNAMED_METHODS).isdisjoint(code.co_names):
            for step in dis.get_instructions(code):
                is_global = step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
                is_method = step.opname in ("LOAD_METHOD", "LOAD_ATTR")
                known = functions if is_global else _UNNAMED_METHODS if is_method else ()
                if step.argval in known:
                    return str(step.argval)
    return None


def _imported_in(func: types.FunctionType) -> list[types.ModuleType]:
    """Modules that it imports itself, when it runs."""
    home = str(func.__globals__.get("__package__"))
    codes = [c for c in codes_in(func.__code__) if dis.opmap["IMPORT_NAME"] in c.co_code[::2]]
    names = [each for code in codes for name in code.co_names for each in (name, f"{home}.{name}")]
    return [sys.modules[name] for name in names if name in sys.modules]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None
