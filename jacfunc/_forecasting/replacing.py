"""A mode in which a function runs on fakes, also where it closes over real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils.flop_counter import flop_registry

from jacfunc._memory import DispatchMode
from jacfunc._types import Tree


class Replacing(DispatchMode):
    """Replaces each tensor that a call meets by its fake, parameters as well, and counts FLOPs.

    FakeTensorMode replaces tensors, too, but below the counter of memory, for which a view of a
    parameter would be new memory. FlopCounterMode has the same formulas, but keeps seeds alive.
    """

    supports_higher_order_operators = True

    def __init__(self, as_fakes: Callable[[Tree], Tree]) -> None:
        super().__init__()
        self._as_fakes = as_fakes
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {**(kwargs or {})}
        if func is torch.ops.aten.lift_fresh.default:  # a literal keeps its value
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and _is_real(args[0]):
            with no_dispatch():  # a module's setting in a buffer: no data of the call
                return func(*args, **kwargs)
        args, kwargs = self._as_fakes((args, kwargs))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)
