"""What a module keeps beside its tensors: copied for each evaluation, found at any depth."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from random import Random
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from jacfunc._torch import recording
from jacfunc._trees import flatten, unflatten

SIMPLE = frozenset({bool, int, float, str, type(None)})
FEW_ENTRIES = 1000
"""Containers with more entries than this are taken for tables of words, which hold no tensors;
an attribute that leads to more objects than this is taken for a program, and left alone."""

_KEEPS = (Tensor, torch.Generator, list, tuple, dict, deque, set, bytearray, Random)
_SHALLOW = (list, tuple, dict, deque, set, frozenset)
_WITHOUT_OBJECTS = (
    *(Tensor, torch.Generator, torch.dtype, torch.device, torch.jit.ScriptModule),
    *(torch.jit.ScriptFunction, type, FunctionType, BuiltinFunctionType, ModuleType, Enum),
    *(logging.Logger, Random),
)


def keeps(value: object) -> bool:
    """Could writing into it, drawing from it, or reading a parameter there make a difference?"""
    if not isinstance(value, _KEEPS):
        return _is_of_numpy(value)
    if not isinstance(value, _SHALLOW):
        return True
    if len(value) > FEW_ENTRIES:
        return False
    return not isinstance(value, tuple) or any(map(keeps, value))


def objects_in(value: object, seen: set[int]) -> list[Any]:
    """Objects that a value leads to and that have attributes, each once; none if there are many.

    ``seen`` holds the identities of those that are known, and is added to.
    """
    found, inside = [], set(seen)
    for some in _objects_in(value, inside):
        found.append(some)
        if len(inside) > FEW_ENTRIES + len(seen):
            return []
    seen |= inside
    return found


def _objects_in(value: object, seen: set[int]) -> Iterator[Any]:
    pending = [value]
    while pending:
        some = pending.pop()
        if type(some) in SIMPLE or isinstance(some, _WITHOUT_OBJECTS) or id(some) in seen:
            continue
        seen.add(id(some))
        if isinstance(some, _SHALLOW):
            if len(some) <= FEW_ENTRIES:
                pending += some.values() if isinstance(some, dict) else some
        elif isinstance(some, MethodType):
            pending.append(some.__self__)
        elif isinstance(some, partial):
            pending += [some.func, *some.args, *some.keywords.values()]
        if not isinstance(some, MethodType) and type(own := _own(some)) is dict and own:
            yield some
            pending += own.values()


def tensors_in(value: object) -> list[Tensor]:
    """Those that a function closes over, a module has, or objects keep, at any depth."""
    pending, seen, found = [value], set[int](), list[Tensor]()
    while pending and len(seen) <= FEW_ENTRIES:
        some = pending.pop()
        if type(some) in SIMPLE or id(some) in seen:
            continue
        seen.add(id(some))
        if isinstance(some, Tensor):
            found.append(some)
        elif isinstance(some, _SHALLOW):
            pending += some.values() if isinstance(some, dict) else some
        elif isinstance(some, FunctionType):
            cells = [cell for cell in some.__closure__ or () if cell != CellType()]
            pending += [cell.cell_contents for cell in cells]
            pending += [some.__defaults__, some.__kwdefaults__]
        elif isinstance(some, MethodType):
            pending.append(some.__self__)
        elif isinstance(some, partial):
            pending += [some.func, some.args, some.keywords]
        elif not isinstance(some, type | ModuleType) and type(own := _own(some)) is dict:
            pending += own.values()
    return found


def _own(some: object) -> object:
    """An object's attributes, without asking what it may compute."""
    try:
        return object.__getattribute__(some, "__dict__")
    except AttributeError:
        return None


def held(tree: Any) -> Any:
    """A copy for later, of all tensors, arrays and containers, without their graphs."""
    leaves, spec = flatten(tree)
    with recording():  # an inference tensor could not be differentiated by
        copies: dict[int, Any] = {
            id(x): x.detach().clone().requires_grad_(x.requires_grad)
            for x in leaves
            if isinstance(x, Tensor)
        }
        return unflatten(spec, [_renewed_leaf(leaf, copies) for leaf in leaves])


def renewed(value: Any, new: dict[int, Any]) -> Any:
    """A copy, in which what is known is replaced and what is not is copied, once.

    Objects stay the same: their attributes are copied where they lie.
    """
    leaves, spec = flatten(value)
    return unflatten(spec, [_renewed_leaf(leaf, new) for leaf in leaves])


def _renewed_leaf(leaf: Any, new: dict[int, Any]) -> Any:
    key = id(leaf)
    if key in new:
        return new[key]
    if isinstance(leaf, Tensor):
        new[key] = leaf.clone()
    elif isinstance(leaf, torch.Generator):
        new[key] = leaf.clone_state()
    elif isinstance(leaf, set | bytearray):
        new[key] = copy.copy(leaf)
    elif isinstance(leaf, Random) or _is_of_numpy(leaf):
        new[key] = copy.deepcopy(leaf)
    elif isinstance(leaf, dict | list | deque) and len(leaf) <= FEW_ENTRIES:
        new[key] = _refilled(copy.copy(leaf), new)
    else:
        return leaf
    return new[key]


def _refilled(own: Any, new: dict[int, Any]) -> Any:
    """A container of a class that trees do not know, with what it holds renewed."""
    pairs = own.items() if isinstance(own, Mapping) else enumerate(own)
    for key, value in list(pairs):
        if type(value) not in SIMPLE:
            own[key] = renewed(value, new)
    return own


def _is_of_numpy(value: object) -> bool:
    """Arrays and generators."""
    return type(value).__module__.partition(".")[0] == "numpy"
