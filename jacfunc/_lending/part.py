"""One of the modules or objects inside a module: what it is at first, and what is put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from jacfunc._lending.attributes import SIMPLE, keeps, objects_in, renewed

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_OWN = frozenset(vars(nn.Module()))
_TORCHS = tuple(
    key
    for key in vars(nn.Module())
    if "_hooks" in key or key in ("_modules", "_non_persistent_buffers_set")
)
Attributes: TypeAlias = dict[str, Any]


@dataclass(slots=True)
class ModulePart:
    """One of the modules inside, or an object that one keeps, and what it is at first."""

    module: Any
    attributes: Attributes
    params: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    plain: Attributes  # attributes of its own that hold state
    filled: list[tuple[Any, Any]]  # hooks by kind, parts, and so on, and as they are at first
    empty: list[Any]  # those of which there are none
    is_module: bool
    is_scripted: bool
    is_table: bool

    @classmethod
    def of(cls, module: Any) -> ModulePart:
        own, is_scripted = vars(module), isinstance(module, torch.jit.ScriptModule)
        plain = {
            key: value
            for key, value in own.items()
            if type(value) not in SIMPLE and key not in _OWN and keeps(value)
        }
        is_module = isinstance(module, nn.Module)
        torchs = [own[key] for key in _TORCHS] if is_module and not is_scripted else []
        return cls(
            module,
            own.copy(),
            dict(module._parameters) if is_module else {},
            dict(module._buffers) if is_module else {},
            plain,
            [(some, some.copy()) for some in torchs if some],
            [none for none in torchs if not none],
            is_module,
            is_scripted,
            isinstance(module, _TABLES),
        )

    @property
    def own(self) -> list[Any]:
        """Attributes that may lead to objects."""
        pairs = self.attributes.items()
        return [x for key, x in pairs if type(x) not in SIMPLE and key not in _OWN]

    def held(self, new: dict[int, Any]) -> ModulePart:
        """With copies of all that it keeps: it stays what it is at first."""
        return replace(self, plain={key: renewed(value, new) for key, value in self.plain.items()})

    def is_as_at_first(self) -> bool:
        """Has nobody put anything else in the place of what it is made of?"""
        if not self.is_module:
            return are_same(vars(self.module), self.attributes)
        return (
            not self.is_scripted
            and are_same(vars(self.module), self.attributes)
            and are_same(self.module._parameters, self.params)
            and are_same(self.module._buffers, self.buffers)
            and not any(self.empty)
            and all(mine == first for mine, first in self.filled)
        )

    def lend(self, new: dict[int, Any]) -> None:
        """Put what is new, by the identity of the old, in its place."""
        params, buffers = _replaced(self.params, new), _replaced(self.buffers, new)
        if self.is_scripted:
            self.put(params, buffers)
            return
        own = vars(self.module)
        if self.is_module:
            # dicts of their own, because a module may register more while it runs
            own["_parameters"], own["_buffers"] = params, buffers
        if self.plain:
            own.update({key: renewed(value, new) for key, value in self.plain.items()})
        if self.is_table:
            own["sparse"] = False  # torch can't batch sparse gradients, and blocks are dense

    def now(self) -> Attributes:
        """What :meth:`give_back` puts in its place."""
        if self.is_scripted:  # it has no dicts, but takes its tensors one by one
            return {"params": dict(self.module._parameters), "buffers": dict(self.module._buffers)}
        own: Attributes = vars(self.module)
        return own.copy()

    def give_back(self, attributes: Attributes) -> None:
        """All attributes as they were, and hooks as they are at first."""
        # models of HuggingFace set hooks when they first run
        for mine in self.empty if any(self.empty) else ():
            mine.clear()
        for mine, first in self.filled:
            if mine != first:
                mine.clear()
                mine.update(first)
        if self.is_scripted:
            self.put(attributes["params"], attributes["buffers"])
            return
        own = vars(self.module)
        if self.is_module:
            own["_parameters"], own["_buffers"] = attributes["_parameters"], attributes["_buffers"]
        # refilled only where it must be: python is slower with a dict that was
        if not are_same(own, attributes):
            own.clear()
            own.update(attributes)

    def put(self, params: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        """Into a scripted module, one by one."""
        for key, tensor in params.items():
            self.module._parameters[key] = tensor
        for key, tensor in buffers.items():
            self.module._buffers[key] = tensor

    def as_now(self) -> list[tuple[Any, Any]]:
        """Its attributes, and the hooks and parts among them, with copies of what they hold."""
        own = vars(self.module)
        tables = [own[key] for key in _TORCHS] if self.is_module else []
        return [(own, own.copy()), *((table, table.copy()) for table in tables)]


def put_back(tables: list[tuple[Any, Any]]) -> None:
    """What :meth:`ModulePart.as_now` has copied, where it was."""
    for table, before in tables:
        table.clear()
        table.update(before)


def are_same(these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """The same objects, under the same names in the same order."""
    if not these and not those:
        return True
    same = len(these) == len(those) and all(map(is_, these.values(), those.values()))
    return same and list(these) == list(those)


def _replaced(tensors: dict[str, Tensor | None], new: Mapping[int, Any]) -> dict[str, Any]:
    return {key: new.get(id(x), x) for key, x in tensors.items()} if tensors else {}


def by_first_name(tensors: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    """Each tensor once: tied ones count under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, named in tensors.items():
        for key, tensor in named.items():
            if tensor is not None:
                first.setdefault(id(tensor), (f"{prefix}.{key}" if prefix else key, tensor))
    return dict(first.values())


def parts_beside(parts: list[ModulePart]) -> list[ModulePart]:
    seen = {id(part.module) for part in parts}
    return [
        ModulePart.of(some)
        for part in parts
        for value in part.own
        for some in objects_in(value, seen)
    ]
