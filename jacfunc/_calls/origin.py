"""Calls of modules: what tells a leaf function which module it calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._types import LeafFunction, Leaves


@dataclass(eq=False)
class ModuleOrigin:
    """The module whose call is differentiated.

    Args:
        state: its :class:`jacfunc._lending.ModuleState`.
        kind: equal for calls of the module that cost the same; asked for when it is needed.
    """

    state: Any
    kind: Callable[[], Hashable]


@dataclass(frozen=True)
class OfCalls:
    """A leaf function that calls a module, with the ``state`` of that module."""

    func: LeafFunction
    state: Any

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        return self.func(*primals)
