"""What the parts of a module were made of at one moment, to compare it with what they are now."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any
from weakref import ref

from torch import Tensor, nn

from jacfunc._lending.part import ModulePart, marks_of, put_back
from jacfunc._remembered import Remembered
from jacfunc._torch import Graphs

_TABLE, _REFERRED = attrgetter("__dict__"), methodcaller("__call__")


class Snapshot:
    """The parts of a module, each as it was when it was looked at.

    Every call compares them, so their tables are compared in a row: part by part takes twice as
    long. They are laid in a row at the first comparison, as many states are never compared.
    """

    def __init__(self, parts: list[ModulePart]) -> None:
        self.parts = parts

    def is_current(self, is_untouched: bool = False) -> bool:
        """Are all parts made of the same objects as then? False for TorchScript, which hides it.

        If tables are ``untouched`` but for what was lent and taken back, they are not compared.
        """
        rows = self.rows
        return rows is not None and rows.are_current(is_untouched)

    def changed_parts(self) -> list[ModulePart]:
        """The parts that are made of other objects now; parts of TorchScript are left out."""
        if self.is_current():
            return []
        return [p for p in self.parts if not p.is_scripted and not p.is_as_at_first()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The module with the modes, hooks and attributes of then; afterwards as before."""
        changed = self.changed_parts()
        tables = [pair for part in changed for pair in part.tables_now()]
        try:
            for part in changed:
                part.give_back(part.attributes)
            yield
        finally:
            put_back(tables)

    @cached_property
    def tables(self) -> list[dict[str, Any]]:
        """The dicts in which the parts have their attributes, if the snapshot is current."""
        return [vars(part.module) for part in self.parts]

    @cached_property
    def rows(self) -> _Rows | None:
        """All tables in a row; None for TorchScript."""
        scripted = any(part.is_scripted for part in self.parts)
        return None if scripted else _Rows(self.parts, self.tables)


class Version:
    """A module, or a loss, as it is now: what is learned of it is remembered of its version.

    Args:
        marks: the objects that it is made of, as weak references: what remembers a version does
            not own the module.
    """

    def __init__(self, marks: list[Any]) -> None:
        self._marks = marks

    @classmethod
    def of(cls, called: Any, what: Hashable, marks: list[Any]) -> Version:
        """The version before, or another one if the marks are others now."""
        known = _versions().get(called, what)
        if known is None or not _are_same(known._marks, marks):
            known = cls(marks)
            _versions().put(called, what, known)
        return known


@cache
def _versions() -> Remembered[Version]:
    """The last version of each module or loss."""
    return Remembered()


def version_at(
    module: nn.Module,
    point: Mapping[str, Tensor],
    parts: Iterable[ModulePart],
    beside: Iterable[ModulePart] | None = None,
) -> Version:
    """The version of a module at its chosen parameters, and of objects beside it if any are given.

    Where these can't be told, or TorchScript hides some, it is another one each time.
    """
    every = [*parts, *(beside or ())]
    marks = [*marks_of(every), *map(ref, point.values())]
    if beside is not None and any(part.is_scripted or part.hides for part in every):
        return Version(marks)
    return Version.of(module, (bool(beside), *point), marks)


def version_of_loss(loss: Any) -> Version:
    """The version of a function, or of a module."""
    parts = map(ModulePart.of, loss.modules()) if isinstance(loss, nn.Module) else ()
    return Version.of(loss, None, marks_of(parts))


def _are_same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


class _Rows:
    """The tables of all parts, one after the other: attributes, parameters, buffers, registries."""

    def __init__(self, parts: list[ModulePart], attributes: list[dict[str, Any]]) -> None:
        modules = [part for part in parts if part.is_module]
        tensors = [(part.attributes["_parameters"], part.params) for part in modules]
        tensors += [(part.attributes["_buffers"], part.buffers) for part in modules]
        pairs = [(own, p.attributes) for own, p in zip(attributes, parts, strict=True)]
        pairs += [(table, first) for table, first in tensors if first]
        self._refer = [part.refers for part in parts]
        self._kinds = [type(part.module) for part in parts]
        self.tables, self._attributes = [table for table, _ in pairs], attributes
        self._sizes = [len(first) for _, first in pairs]
        self._names = [name for _, first in pairs for name in first]
        self._values = [value for _, first in pairs for value in first.values()]
        filled = [pair for part in parts for pair in part.filled]
        self._filled, self._entries = [r for r, _ in filled], [first for _, first in filled]
        self._empty = [registry for part in parts for registry in part.empty]
        self._empty += [table for table, first in tensors if not first]
        self.versions: list[int] = []
        """Of the tables, when they were last found to be as then."""

    def are_current(self, is_untouched: bool) -> bool:
        """Does each table hold the same objects, under the same names in the same order?"""
        modules = [*map(_REFERRED, self._refer)]
        if (
            [*map(type, modules)] != self._kinds
            or not all(map(is_, map(_TABLE, modules), self._attributes))
            or any(self._empty)
            or self._filled != self._entries
        ):
            return False
        versions = [*map(Graphs.version_of, self.tables)]
        # they are looked through only if one was written into meanwhile
        if not (is_untouched or versions == self.versions or self._hold_the_same()):
            return False
        self.versions = versions
        return True

    def _hold_the_same(self) -> bool:
        values: Iterator[Any] = chain.from_iterable(map(dict.values, self.tables))
        return (
            list(map(len, self.tables)) == self._sizes
            and all(map(is_, values, self._values))
            and list(chain.from_iterable(self.tables)) == self._names
        )
