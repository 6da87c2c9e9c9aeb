"""A call that is differentiated by all of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jacfunc._calls.derivation import Derivation
from jacfunc._calls.flat_call import FlatCall
from jacfunc._types import Tree


def at_all(
    api: str, func: Callable[..., Any], primals: tuple[Tree, ...], has_aux: bool
) -> FlatCall:
    """The call, differentiated by all of its arguments."""
    if not isinstance(primals, tuple | list):
        raise TypeError(
            f"{api}: primals must be a tuple of the arguments of func, got "
            f"{type(primals).__name__}. Write (x,) for the only one."
        )
    if not primals:
        raise ValueError(
            f"{api}: there must be at least one primal to differentiate by, got none. "
            "Pass the arguments of func."
        )
    primals = tuple(primals)
    return FlatCall(Derivation(api, func, tuple(range(len(primals))), has_aux), primals, {})
