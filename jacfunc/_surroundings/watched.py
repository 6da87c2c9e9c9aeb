"""Whether containers, objects and functions hold the same objects as before."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from jacfunc._surroundings.things import value_of
from jacfunc._torch import Graphs
from jacfunc._trees import slots_of

REGISTRIES = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
"""Attributes of every module: mostly empty, and a call that looks at each takes twice as long."""

_of_function = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_call: Any = call  # which map has no types for
_of_cell = attrgetter("cell_contents")


@dataclass(eq=False)
class Watched:
    """What may come to hold other objects, in one row for each kind of it.

    Every call compares all of it, in rows, as steps of Python for each thing would take ten times
    as long. Objects are compared by identity: a number that equals another may be of another type.
    """

    dicts: list[dict[Any, Any]] = field(default_factory=list)
    lists: list[Any] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    slotted: list[Any] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    cells: list[types.CellType] = field(default_factory=list)
    functions: list[types.FunctionType] = field(default_factory=list)
    looked_up: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Tables of globals, with a name in each."""
    asked: list[Callable[[], Any]] = field(default_factory=list)
    """What is compared by what it returns: references to objects, variables of a context."""
    copied: list[Any] = field(default_factory=list)
    """Arrays and sets, which are compared by what they hold."""
    tensors: list[Tensor] = field(default_factory=list)
    """Tensors, which are compared by the hooks on their gradients."""
    empty: list[Any] = field(default_factory=list)
    """Containers of nothing: most tables of a module are, and it takes little to see that."""

    def keep(self) -> None:
        """From now on all of it is compared with what it is now."""
        self._sources = [*self._all_sources()]
        self._row = [*self._now()]
        self._has_sizes = bool(self.dicts or self.objects or self.lists)
        self._sizes = self._sizes_now()
        self._keys = [*chain.from_iterable(self.dicts)]
        self._copies = [*map(value_of, self.copied)]

    def are_same(self) -> bool:
        """Does everything hold the same objects as when it was kept?"""
        try:
            return (
                all(map(is_, self._now(), self._row))
                and not any(self.empty)
                and not (self._has_sizes and self._sizes_now() != self._sizes)
                and not (self.dicts and [*chain.from_iterable(self.dicts)] != self._keys)
                and not (self.copied and [*map(value_of, self.copied)] != self._copies)
            )
        # an attribute or the contents of a cell are gone; another thread changes a table
        except (KeyError, ValueError, RuntimeError):
            return False

    def _sizes_now(self) -> list[int]:
        return [*map(len, self.dicts), *map(len, map(vars, self.objects)), *map(len, self.lists)]

    def _now(self) -> Iterator[Any]:
        """All objects that are held, one after the other."""
        return chain.from_iterable([source() for source in self._sources])

    def _all_sources(self) -> Iterator[Callable[[], Iterable[Any]]]:
        """What returns the objects of one row, for each row that has some."""
        together = chain.from_iterable
        if self.objects:
            attributes = [*map(_attributes_of, self.objects)]
            yield lambda: together(map(_call, attributes, map(vars, self.objects)))
            yield partial(map, type, self.objects)
        if self.dicts:
            yield lambda: together(map(dict.values, self.dicts))
        if self.looked_up:
            tables, names = zip(*self.looked_up, strict=True)
            yield partial(map, dict.get, tables, names)
        if self.cells:
            yield partial(map, _of_cell, self.cells)
        if self.functions:
            yield lambda: together(map(_of_function, self.functions))
        if self.lists:
            yield partial(together, self.lists)
        if self.tensors:
            yield partial(map, Graphs.hooks_of, self.tensors)
        if self.asked:
            yield partial(map, _call, self.asked)
        for kind in self.classes:
            yield vars(kind).values
            yield lambda kind=kind: (kind.__bases__,)  # type: ignore[misc]
        for thing in self.slotted:
            yield partial(map, getattr, repeat(thing), slots_of(thing), repeat(None))


def _attributes_of(thing: Any) -> Callable[[dict[str, Any]], Any]:
    """Looks up what is watched of an object's attributes: all but a module's empty registries."""
    own = vars(thing)
    is_module = isinstance(thing, nn.Module)
    names = [name for name in own if not is_module or name not in REGISTRIES or own[name]]
    if len(names) < 2:  # of one name it would return the value itself
        return dict.values
    return itemgetter(*names)
