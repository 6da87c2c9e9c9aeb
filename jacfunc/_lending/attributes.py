"""Plain attributes of modules and objects: how they are searched, and how they are copied."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from random import Random
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from jacfunc._torch import recording
from jacfunc._trees import attributes_of, flatten, flatten_containers, referred, unflatten

SIMPLE = frozenset({bool, int, float, str, type(None)})
FEW_ENTRIES = 1000
"""A container with more entries is taken for a table of words, which holds no tensors; an attribute
that leads to more objects is taken for a program, and left alone."""

_AS_THEY_ARE = SIMPLE | {ref}
"""Values that nobody can write into. Recurrent layers keep weak references to their weights."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_KEEPS = (Tensor, torch.Generator, list, tuple, dict, deque, set, bytearray, Random)
_SHALLOW = (list, tuple, dict, deque, set, frozenset)
_WITHOUT_OBJECTS = (
    *(Tensor, torch.Generator, torch.dtype, torch.device, torch.jit.ScriptModule),
    *(torch.jit.ScriptFunction, type, FunctionType, BuiltinFunctionType, ModuleType, Enum),
    *(logging.Logger, Random),
)


def keeps(value: object) -> bool:
    """Must an evaluation get a copy of the value?

    It must where the module could write into it, draw random numbers from it, or find a parameter
    in it.
    """
    if not isinstance(value, _KEEPS):
        return _is_of_numpy(value)
    if not isinstance(value, _SHALLOW):
        return True
    if _size(value) > FEW_ENTRIES:
        return False
    return not isinstance(value, tuple) or any(map(keeps, value))


def _size(container: Any) -> int:
    """The number of entries, also of a class whose own ``len`` counts something else, or raises."""
    kind: Any = next(each for each in _SHALLOW if isinstance(container, each))
    return int(kind.__len__(container))


def _entries(container: Any) -> Iterator[Any]:
    """The values of a dict, or what another container has: an iterator, which asks for no size."""
    return iter(container.values() if isinstance(container, dict) else container)


def objects_in(value: object, visited: set[int]) -> list[Any]:
    """Objects with attributes that a value leads to, each once; none if there are many.

    Objects whose identities are in ``visited`` are left out; those of the result are added to it.
    """
    objects, identities = [], set(visited)
    for item in _objects_in(value, identities):
        objects.append(item)
        if len(identities) > FEW_ENTRIES + len(visited):
            return []
    visited |= identities
    return objects


def _objects_in(value: object, visited: set[int]) -> Iterator[Any]:
    pending = [value]
    while pending:
        item = pending.pop()
        if type(item) in SIMPLE or isinstance(item, _WITHOUT_OBJECTS) or id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, _SHALLOW):
            if _size(item) <= FEW_ENTRIES:
                pending += _entries(item)
        elif isinstance(item, MethodType):
            pending.append(item.__self__)
        elif isinstance(item, partial):
            pending += [item.func, *item.args, *item.keywords.values()]
        if not isinstance(item, MethodType) and type(own := attributes_of(item)) is dict and own:
            yield item
            pending += own.values()


def containers_in(values: Iterable[object]) -> list[Any]:
    """The lists, dicts and the like among values."""
    return [value for value in values if isinstance(value, list | dict | set | deque)]


def refill(container: Any, before: Any) -> None:
    """Fill a container again as its copy is filled."""
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(before)


def tensors_in(value: object) -> list[Tensor]:
    """Tensors that a function refers to, that a module has, or that objects keep at any depth."""
    pending, visited, tensors = [value], set[int](), list[Tensor]()
    while pending and len(visited) <= FEW_ENTRIES:
        item = pending.pop()
        if type(item) in SIMPLE or id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            tensors.append(item)
        else:
            pending += referred(item)
    return tensors


def detached_copy(tree: Any) -> Any:
    """A copy of a tree: of its tensors without their graphs, of its arrays and its containers."""
    leaves, spec = flatten(tree)
    with recording():  # an inference tensor could not be differentiated by
        copies: dict[int, Any] = {
            id(x): x.detach().clone().requires_grad_(x.requires_grad)
            for x in leaves
            if isinstance(x, Tensor)
        }
        return unflatten(spec, [_leaf_with(leaf, copies) for leaf in leaves])


def copy_with(value: Any, new: dict[int, Any]) -> Any:
    """A copy of a value; ``new`` has by identity what takes the place of tensors and containers.

    What ``new`` lacks is copied, and added to it. Objects stay the same: whoever lends the module
    copies their attributes, too.
    """
    # most are short, and have plain values: for these a tree costs ten times as much as the copy
    if type(value) is list:
        return [x if type(x) in _AS_THEY_ARE else copy_with(x, new) for x in value]
    if type(value) in _TENSORS:
        return _leaf_with(value, new)
    if type(value) is set:
        return new.setdefault(id(value), value.copy())
    if type(value) is dict and SIMPLE.issuperset(map(type, value.values())):
        return value.copy()
    leaves, spec = flatten_containers(value)
    return unflatten(spec, [_leaf_with(leaf, new) for leaf in leaves])


def _leaf_with(leaf: Any, new: dict[int, Any]) -> Any:
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
        new[key] = _container_with(copy.copy(leaf), new)
    else:
        return leaf
    return new[key]


def _container_with(own: Any, new: dict[int, Any]) -> Any:
    """A container of a class that is no tree, each of its values replaced by a copy."""
    pairs = own.items() if isinstance(own, Mapping) else enumerate(own)
    for key, value in list(pairs):
        if type(value) not in SIMPLE:
            own[key] = copy_with(value, new)
    return own


def _is_of_numpy(value: object) -> bool:
    """Is it an array or a generator of NumPy?"""
    return type(value).__module__.partition(".")[0] == "numpy"
