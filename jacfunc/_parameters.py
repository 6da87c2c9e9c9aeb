"""What a module is made of: tensors by name, lent to it for a call, and all that it keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jacfunc._check import Refused
from jacfunc._constants import Constants, constants_of
from jacfunc._guard import check_scripted
from jacfunc._select import Select, chosen
from jacfunc._tree import flatten, unflatten

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_OWN = frozenset(vars(nn.Module()))
_TORCHS = tuple(
    key
    for key in vars(nn.Module())
    if "_hooks" in key or key in ("_modules", "_non_persistent_buffers_set")
)
_SIMPLE = frozenset({bool, int, float, str, type(None)})
_KEEPS = (Tensor, torch.Generator, list, tuple, dict, deque)
_FEW = 1000
"""Containers with more entries than this are taken for tables of words, which hold no tensors."""


@dataclass(slots=True)
class Part:
    """One of the modules inside, and what it is at first."""

    module: nn.Module
    attributes: dict[str, Any]
    params: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    plain: dict[str, Any]  # attributes of its own that hold state
    filled: list[tuple[Any, Any]]  # hooks by kind, parts, and so on, and as they are at first
    empty: list[Any]  # those of which there are none
    is_scripted: bool
    is_table: bool

    @classmethod
    def of(cls, module: nn.Module) -> Part:
        own, is_scripted = vars(module), isinstance(module, torch.jit.ScriptModule)
        plain = {
            key: value
            for key, value in own.items()
            if type(value) not in _SIMPLE and key not in _OWN and _keeps(value)
        }
        torchs = [] if is_scripted else [own[key] for key in _TORCHS]
        return cls(
            module,
            own.copy(),
            dict(module._parameters),
            dict(module._buffers),
            plain,
            [(some, some.copy()) for some in torchs if some],
            [none for none in torchs if not none],
            is_scripted,
            isinstance(module, _TABLES),
        )

    def is_as_at_first(self) -> bool:
        """Has nobody put anything else in the place of what it is made of?"""
        return (
            not self.is_scripted
            and _are_same(vars(self.module), self.attributes)
            and _are_same(self.module._parameters, self.params)
            and _are_same(self.module._buffers, self.buffers)
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
        # dicts of their own, because a module may register more while it runs
        own["_parameters"], own["_buffers"] = params, buffers
        if self.plain:
            own.update({key: _renewed(value, new) for key, value in self.plain.items()})
        if self.is_table:
            own["sparse"] = False  # torch can't batch sparse gradients, and blocks are dense

    def give_back(self, attributes: dict[str, Any]) -> None:
        """All attributes as they were."""
        own = vars(self.module)
        # models of HuggingFace set hooks when they first run
        for mine in self.empty if any(self.empty) else ():
            mine.clear()
        for mine, first in self.filled:
            if mine != first:
                mine.clear()
                mine.update(first)
        if not self.is_scripted:
            own["_parameters"], own["_buffers"] = attributes["_parameters"], attributes["_buffers"]
        # refilled only where it must be: python is slower with a dict that was
        if not _are_same(own, attributes):
            own.clear()
            own.update(attributes)
        if self.is_scripted:
            self.put(self.params, self.buffers)

    def put(self, params: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        """Into a scripted module: it has no dicts, but takes its tensors one by one."""
        for key, tensor in params.items():
            self.module._parameters[key] = tensor
        for key, tensor in buffers.items():
            self.module._buffers[key] = tensor


@dataclass(frozen=True, eq=False)
class ModuleState:
    """Parameters and buffers of a module: those that are differentiated, and the constants."""

    parts: dict[str, Part]  # each once, under its first name
    point: dict[str, Tensor]  # the chosen parameters, with the values to differentiate at
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: Constants

    @classmethod
    def of(cls, api: str, module: nn.Module, select: Select) -> ModuleState:
        parts = {name: Part.of(part) for name, part in module.named_modules()}
        params = _by_first_name({name: part.params for name, part in parts.items()})
        buffers = _by_first_name({name: part.buffers for name, part in parts.items()})
        for name, tensor in (*params.items(), *buffers.items()):
            if type(tensor) is not nn.Parameter and is_lazy(tensor):
                raise ValueError(
                    f"{api}: the module must know its shapes, got {name}, which is not initialized "
                    "yet. Call the module once before."
                )
        return cls(parts, chosen(api, params, select), params, buffers, constants_of(module))

    @classmethod
    def after(
        cls, before: ModuleState | None, api: str, module: nn.Module, select: Select
    ) -> ModuleState:
        """At a later call: as it was before, unless something else is in a place.

        To look takes a third of what it takes to make it.
        """
        if before is None or not all(map(Part.is_as_at_first, before.parts.values())):
            return cls.of(api, module, select)
        point = chosen(api, before.params, select)
        return before if _are_same(point, before.point) else replace(before, point=point)

    @property
    def module(self) -> nn.Module:
        """The whole."""
        return self.parts[""].module

    @property
    def functions(self) -> list[Any]:
        """All that torch calls when the module is called: its parts, and hooks before and after."""
        modules = [part.module for part in self.parts.values()]
        calls = [call for module in modules for call in (type(module).__call__, module.forward)]
        hooks = [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in modules]
        return calls + [hook for some in hooks for hook in some]

    def buffers_now(self) -> dict[str, Tensor]:
        """As the module has left them, while it is lent."""
        return dict(self.parts[""].module.named_buffers())

    def check_forward(self) -> None:
        """Refuse forward mode where it would not do as the module does in a backward pass."""
        for name, part in self.parts.items():
            module = part.module
            if part.is_scripted:
                check_scripted(module)
            if module._backward_hooks or module._backward_pre_hooks:
                raise Refused(f"torch's forward mode passes by the backward hooks of {name!r}")

    @contextmanager
    def lent(self, given: Mapping[str, Tensor]) -> Iterator[None]:
        """The module with parameters given anew, the others constant; then all is as it was.

        What it writes into meanwhile are copies: of its buffers, and of the tensors, generators
        and containers that it keeps as plain attributes. Parameters are found in these too.
        """
        new: dict[int, Any] = {id(self.params[name]): param for name, param in given.items()}
        new |= {id(buffer): buffer.clone() for buffer in self.buffers.values()}
        before = [(part, dict(vars(part.module))) for part in self.parts.values()]
        others = {name: param for name, param in self.params.items() if name not in given}
        with self.constants.lent(others, self.parts[""].module.training) as constants:
            new |= constants
            try:
                for part, _ in before:
                    part.lend(new)
                yield
            finally:
                for part, attributes in before:
                    part.give_back(attributes)


def _are_same(these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """The same objects, under the same names in the same order."""
    if not these and not those:
        return True
    are_same = len(these) == len(those) and all(map(is_, these.values(), those.values()))
    return are_same and list(these) == list(those)


def _replaced(tensors: dict[str, Tensor | None], new: Mapping[int, Any]) -> dict[str, Any]:
    return {key: new.get(id(x), x) for key, x in tensors.items()} if tensors else {}


def _by_first_name(tensors: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    """Each tensor once: tied ones count under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, named in tensors.items():
        for key, tensor in named.items():
            if tensor is not None:
                first.setdefault(id(tensor), (f"{prefix}.{key}" if prefix else key, tensor))
    return dict(first.values())


def _keeps(value: object) -> bool:
    """Could writing into it, drawing from it, or reading a parameter there make a difference?"""
    if not isinstance(value, _KEEPS):
        return False
    if isinstance(value, Tensor | torch.Generator):
        return True
    if len(value) > _FEW:
        return False
    return not isinstance(value, tuple) or any(map(_keeps, value))


def _renewed(value: Any, new: dict[int, Any]) -> Any:
    """A copy, in which what is known is replaced and what is not is cloned, once."""
    leaves, spec = flatten(value)
    for leaf in leaves:
        if id(leaf) not in new and isinstance(leaf, Tensor):
            new[id(leaf)] = leaf.clone()
        elif id(leaf) not in new and isinstance(leaf, torch.Generator):
            new[id(leaf)] = leaf.clone_state()
    return unflatten(spec, [new.get(id(leaf), leaf) for leaf in leaves])
