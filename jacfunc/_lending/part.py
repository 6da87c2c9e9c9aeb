"""The modules and objects inside a module: what each is made of, and how that is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import is_, itemgetter
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn

from jacfunc._lending.attributes import SIMPLE, copy_with, keeps, objects_in, refill

_TABLES = (nn.Embedding, nn.EmbeddingBag)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_HOOKS = [key for key in vars(nn.Module()) if "_hooks" in key]
_REGISTRIES = [*_HOOKS, "_modules", "_non_persistent_buffers_set"]
"""Attributes of every module that hold hooks, submodules and names."""
_REGISTRIES_OF = itemgetter(*_REGISTRIES)
Attributes: TypeAlias = dict[str, Any]


@dataclass(slots=True)
class ModulePart:
    """A submodule, or an object that a module keeps, and what it was made of at first."""

    refers: Callable[[], Any]
    """Leads to it; weakly to a submodule, which other parts own, and to the module itself."""
    attributes: Attributes
    own: Attributes
    """Attributes beside those of every module."""
    params: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    plain: Attributes
    """Its own attributes of which each evaluation gets a copy."""
    filled: list[tuple[Any, Any]]
    """Registries with entries, and copies of them."""
    empty: list[Any]
    """Registries without entries."""
    is_module: bool
    is_scripted: bool
    is_table: bool
    has_hooks: bool
    """Has it hooks, which run in a forward or a backward pass?"""
    has_tensors: bool
    """Is there anything to lend but empty dicts of parameters and buffers?"""

    @classmethod
    def of(cls, module: Any, refers: Callable[[], Any] | None = None) -> ModulePart:
        """The part as it is now."""
        attributes, is_scripted = vars(module), isinstance(module, torch.jit.ScriptModule)
        own = {key: value for key, value in attributes.items() if key not in OF_EVERY_MODULE}
        plain = {key: x for key, x in own.items() if type(x) not in SIMPLE and keeps(x)}
        is_module = isinstance(module, nn.Module)
        registries = _REGISTRIES_OF(attributes) if is_module and not is_scripted else ()
        filled = [r for r in registries if r] if any(registries) else []  # most have none
        has_tensors = is_module and bool(plain or module._parameters or module._buffers)
        return cls(
            refers or partial(_itself, module),
            attributes.copy(),
            own,
            dict(module._parameters) if is_module else {},
            dict(module._buffers) if is_module else {},
            plain,
            [(registry, registry.copy()) for registry in filled],
            [registry for registry in registries if not registry] if filled else [*registries],
            is_module,
            is_scripted,
            isinstance(module, _TABLES),
            is_module and bool(filled or is_scripted) and any(map(attributes.get, _HOOKS)),
            has_tensors or isinstance(module, _TABLES) or is_scripted or not is_module,
        )

    @property
    def module(self) -> Any:
        """The submodule or object itself."""
        return self.refers()

    def copied(self, new: dict[int, Any]) -> ModulePart:
        """A part that keeps copies of its state: later writes do not change what it lends."""
        return replace(self, plain={key: copy_with(x, new) for key, x in self.plain.items()})

    @property
    def hides(self) -> bool:
        """Is it no submodule, and keeps containers that may lead to anything?"""
        kept = () if self.is_module else self.plain.values()
        return any(not isinstance(x, Tensor) and not _is_of_values(x) for x in kept)

    def marks(self) -> list[Any]:
        """The objects that it is made of, as weak references where there can be such."""
        registries = [registry for _, registry in self.filled if isinstance(registry, dict)]
        forward = getattr(type(self.module), "forward", None)
        marks = [_mark(self.module), forward, len(self.own), self.attributes.get("training")]
        for table in (self.own, self.params, self.buffers, *registries):
            for key, value in table.items():
                marks += (key, value if type(value) in SIMPLE else _mark(value))
        return marks

    def is_as_at_first(self) -> bool:
        """Are all attributes, tensors, hooks and submodules still the same objects?"""
        if not self.is_module:
            return are_same(vars(self.module), self.attributes)
        return (
            not self.is_scripted
            and are_same(vars(self.module), self.attributes)
            and are_same(self.module._parameters, self.params)
            and are_same(self.module._buffers, self.buffers)
            and not any(self.empty)
            and all(registry == first for registry, first in self.filled)
        )

    def lend(self, own: Attributes, new: dict[int, Any]) -> None:
        """Put tensors and containers among its ``own`` attributes, as they are now.

        ``new`` has them by the identity of the old.
        """
        params = _in_place_of(self.params, new)
        buffers = _in_place_of(self.buffers, new) if self.buffers else {}
        if self.is_scripted:
            self._put_tensors(params, buffers)
            return
        if self.is_module:
            # dicts of their own, because a module may register more while it runs
            own["_parameters"], own["_buffers"] = params, buffers
        if self.plain:
            own.update({key: copy_with(value, new) for key, value in self.plain.items()})
        if self.is_table:
            own["sparse"] = False  # torch can't batch sparse gradients, and blocks are dense

    def give_back(self, attributes: Attributes) -> None:
        """Put attributes in place; hooks and submodules become those of the beginning."""
        # models of HuggingFace set hooks when they first run
        for registry in self.empty if any(self.empty) else ():
            registry.clear()
        for registry, first in self.filled:
            if registry != first:
                registry.clear()
                registry.update(first)
        if self.is_scripted:
            self._put_tensors(attributes["params"], attributes["buffers"])
            return
        own = vars(self.module)
        if self.is_module:
            own["_parameters"], own["_buffers"] = attributes["_parameters"], attributes["_buffers"]
        # refilled only where it must be: python is slower with a dict that was
        if not are_same(own, attributes):
            own.clear()
            own.update(attributes)

    def _put_tensors(self, params: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        """Put tensors into a scripted module, one by one."""
        for table, new in (self.module._parameters, params), (self.module._buffers, buffers):
            for key, tensor in new.items():
                table[key] = tensor

    def tables_now(self) -> list[tuple[Any, Any]]:
        """The dict of attributes and the registries, each with a copy, for :func:`put_back`."""
        own = vars(self.module)
        tables = [own, *(own[key] for key in _REGISTRIES)] if self.is_module else [own]
        return [(table, table.copy()) for table in tables]


def _itself(value: Any) -> Any:
    return value


def _in_place_of(tensors: Mapping[str, Tensor | None], new: dict[int, Any]) -> dict[str, Any]:
    """What stands for each tensor, in few calls, as every evaluation asks."""
    olds = tensors.values()
    return dict(zip(tensors, map(new.get, map(id, olds), olds), strict=True))


def _is_of_values(value: Any) -> bool:
    """Is it a plain value, or a container of such?"""
    if isinstance(value, dict):
        return all(map(_is_of_values, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_of_values, value))
    return type(value) in SIMPLE


def _mark(value: Any) -> Any:
    """A mark of a value: that of another object is another one."""
    try:
        return ref(value)
    except TypeError:
        return value


def put_back(tables: list[tuple[Any, Any]]) -> None:
    """Fill each container again as its copy tells (see :meth:`ModulePart.tables_now`)."""
    for table, before in tables:
        refill(table, before)


def attributes_of(parts: Iterable[ModulePart]) -> list[Attributes]:
    """The present attributes of each part, for :func:`give_back` to put in place again."""
    return [  # TorchScript has no dicts, but takes its tensors one by one
        {"params": dict(part.module._parameters), "buffers": dict(part.module._buffers)}
        if part.is_scripted
        else vars(part.module).copy()
        for part in parts
    ]


def are_same(these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """Do two dicts have the same objects, under the same names in the same order?"""
    same = len(these) == len(those) and all(map(is_, these.values(), those.values()))
    return same and (not these or list(these) == list(those))


def marks_of(parts: Iterable[ModulePart]) -> list[Any]:
    """The objects that parts are made of, in a row; see :meth:`ModulePart.marks`."""
    return [mark for part in parts for mark in part.marks()]


def by_first_name(tensors: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    """Each tensor once: tied ones count under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, named in tensors.items():
        for key, x in named.items():
            if x is not None:
                first.setdefault(id(x), (f"{prefix}.{key}" if prefix else key, x))
    return dict(first.values())


def parts_in(module: nn.Module) -> dict[str, ModulePart]:
    """The submodules, the module itself among them, each once under its first name."""
    # TorchScript's have no registries to own others
    weakly = lambda x: x is module or not isinstance(x, torch.jit.ScriptModule)  # noqa: E731
    every = module.named_modules()
    return {n: ModulePart.of(x, ref(x) if weakly(x) else None) for n, x in every}


def parts_beside(parts: list[ModulePart]) -> list[ModulePart]:
    """Objects that the parts keep as attributes, at any depth, without the parts themselves."""
    visited = {id(part.module) for part in parts}
    return [
        ModulePart.of(kept)
        for part in parts
        for value in part.own.values()
        if type(value) not in SIMPLE
        for kept in objects_in(value, visited)
    ]
