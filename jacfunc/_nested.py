"""The watch of whoever pulls back or maps: torch's own forward mode may run inside and outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload

from jacfunc._functorch import is_batched
from jacfunc._guard import FAULTY, Around, check_push, check_pushed
from jacfunc._misread import tensors_of
from jacfunc._watch import Watch, name_of


class NestedWatch(Watch):
    """Watches a function for what its graph does not show, and what is pushed by others for faults.

    A push by :mod:`torch.func`, inside the function or outside of the derivative, meets the table
    of forward mode here.
    """

    def pushed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call while tangents pass through."""
        name = name_of(func)
        if name not in FAULTY and not isinstance(func, OpOverload):
            return super().pushed(func, args, kwargs)
        # vmaps of tangents alone do no harm
        is_mapped = any(map(is_batched, tensors_of(args, kwargs)))
        check_push(func, name, args, kwargs, Around(int(is_mapped), keeps_graph=True))
        result = super().pushed(func, args, kwargs)
        check_pushed(name, result)
        return result
