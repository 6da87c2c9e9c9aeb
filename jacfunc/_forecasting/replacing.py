"""What is met while a function runs on tensors without numbers, replaced by such tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from jacfunc._types import Tree


class Replacing(TorchDispatchMode):
    """Replaces what the function closes over too, parameters say, and counts FLOPs.

    FakeTensorMode replaces by itself, but below the counter of memory: a view of a parameter
    would count as new. FlopCounterMode counts by the same formulas, but keeps seeds alive.
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
        given = {**(kwargs or {})}
        if func is torch.ops.aten.lift_fresh.default:  # a literal: it keeps its value
            return func(*args, **given)
        if func is torch.ops.aten._local_scalar_dense.default and _is_real(args[0]):
            with no_dispatch():  # a setting that a module holds in a buffer, not the data
                return func(*args, **given)
        args, given = self._as_fakes((args, given))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        result = func(*args, **given)
        if formula is not None:
            self.flops += int(formula(*args, **given, out_val=result))
        return result


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)
