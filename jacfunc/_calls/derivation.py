"""What is differentiated: a function by some of its arguments, which may call a module."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._arguments import check_flags, check_func
from jacfunc._types import Argnums, LeafFunction, Leaves


@dataclass(eq=False)
class Derivation:
    """What is differentiated, before any arguments come.

    Args:
        api: the name of the public function, with which error messages begin.
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments it is differentiated by.
        has_aux: ``func`` returns ``(output, aux)``.

    Raises:
        TypeError: if ``func`` is not callable, or ``has_aux`` neither True nor False.
    """

    api: str
    func: Callable[..., Any]
    argnums: Argnums = 0
    has_aux: bool = False

    def __post_init__(self) -> None:
        check_func(self.api, self.func)
        check_flags(self.api, has_aux=self.has_aux)


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
