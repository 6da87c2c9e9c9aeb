"""The table of functions whose forward mode is wrong in torch, and the watch that refuses them.

Each entry is pinned by a test in
``tests/faults/test_faults.py``; ``tests/faults/test_opinfo.py`` and
``tests/house/test_coverage.py`` look for more.
Nothing is seen of what runs inside a ``torch.jit`` function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from jacfunc._errors import Refused
from jacfunc._faults.callers import without_tangent
from jacfunc._faults.formulas import FORMULAS, PRODUCTS
from jacfunc._faults.lookups import Args, lookup, tensors_of
from jacfunc._faults.operations import SEEN_OTHERWISE, WATCHED
from jacfunc._faults.watch import Watch, name_of
from jacfunc._torch import (
    below_transforms,
    innermost_level,
    is_recording_at,
    is_second_order_forward,
    is_third_order,
    is_tracked,
    lacks_forward_kernel,
    newer_transforms,
    pushed_product,
)

Kwargs: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class PushContext:
    """What is around a push: the number of vmaps; is a plain graph of the result kept?"""

    num_vmaps: int
    keeps_graph: bool


@dataclass(frozen=True)
class ForwardFault:
    """Names of functions whose pushforward is wrong, in which calls, and why."""

    names: frozenset[str]
    applies: Callable[[Kwargs, Args, PushContext], bool]
    reason: str


def _with_prod(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return "prod" in args or kwargs.get("reduce") == "prod"


def _always(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return True


def _with_options(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return kwargs.get("options") is not None


def _with_gradient_convention(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    call = lookup(args, kwargs)
    if call is None:
        return False
    return call.by_frequency or bool(below_transforms(call.is_padding).any())


def _under_vmap(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return around.num_vmaps > 0


def _drops_under_vmap(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return around.num_vmaps > 0 and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0) > 0


def _at_second_order(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return is_second_order_forward(tensors_of(args, kwargs), around.keeps_graph)


def _at_third_order(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return is_third_order(tensors_of(args, kwargs), around.keeps_graph)


def _inside_forward(kwargs: Kwargs, args: Args, around: PushContext) -> bool:
    return newer_transforms(0).count("Jvp") > 1


_LU_SOLVES = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "linalg_")
    for name in ("det", "slogdet", "logdet", "solve", "solve_ex", "tensorsolve")
)
_DETERMINANTS = frozenset({"det", "linalg_det"})
_KEEPS_STATISTICS = frozenset(
    {
        "layer_norm",
        "native_layer_norm",
        "batch_norm",
        "native_batch_norm",
        "native_batch_norm_legit",
        "native_batch_norm_legit_functional",
        "batch_norm_with_update",
        "instance_norm",
    }
)

FORWARD_FAULTS = (
    ForwardFault(
        frozenset({"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"}),
        _with_prod,
        "its forward derivative is zero",
    ),
    ForwardFault(
        frozenset({"cholesky_inverse", "as_strided_scatter"}),
        _always,
        "its forward formula is wrong",
    ),
    ForwardFault(
        frozenset({"triangular_solve"}), _always, "it takes the triangle that is not read for read"
    ),
    ForwardFault(
        frozenset({"linear_cross_entropy"}),
        _with_options,
        "its forward derivative is zero when chunked",
    ),
    ForwardFault(
        frozenset({"embedding"}),
        _with_gradient_convention,
        "padding_idx and scale_grad_by_freq change its gradient but not its forward derivative",
    ),
    ForwardFault(
        _LU_SOLVES, _under_vmap, "inside an outer vmap its forward derivative misreads memory"
    ),
    ForwardFault(
        frozenset({"scaled_dot_product_attention"}),
        _drops_under_vmap,
        "inside an outer vmap its dropout ends the process",
    ),
    ForwardFault(
        _LU_SOLVES | _KEEPS_STATISTICS,
        _at_second_order,
        "its forward derivative keeps saved factors or statistics constant, "
        "so derivatives of it are wrong",
    ),
    ForwardFault(
        frozenset({"custom_function_call"}),
        _inside_forward,
        "inside another forward derivative torch takes what its jvp has saved for constants",
    ),
    ForwardFault(
        frozenset({"linalg_eigh", "linalg_eigvalsh"}),
        _at_third_order,
        "the gradient of its second forward derivative is nan",
    ),
)


FAULTY = _DETERMINANTS.union(*(fault.names for fault in FORWARD_FAULTS))
"""All names in the table."""


class ForwardWatch(Watch):
    """Watches a function in forward mode, and refuses calls whose tangents would be wrong."""

    pushes = True

    def __init__(self, around: PushContext) -> None:
        # grad mode may be on for the watch alone: then no plain graph is kept
        super().__init__(keeps_graph=around.keeps_graph)
        self._around = around
        self._is_recording = torch.is_grad_enabled()
        self._level = (innermost_level() or 0) + 1

    def pushed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call in forward mode.

        Raises:
            Refused: if its tangents would be wrong.
        """
        name = name_of(func)
        is_known = not isinstance(func, OpOverload) and name not in FAULTY
        is_product = func in PRODUCTS and len(args) > 1 and not kwargs
        self.stays_watched |= is_product or func in SEEN_OTHERWISE or not is_known
        if name == "get__" and _asks_for_graph(func, args[0]):
            return True
        if name == "register_hook":
            raise Refused("torch's forward mode passes by the hooks of tensors")
        check_push(func, name, args, kwargs, self._around)
        if is_product:
            result = pushed_product(func, args)
        else:
            result = self.by_rule(func, args, kwargs) if func in WATCHED else func(*args, **kwargs)
        if self._is_recording and not is_recording_at(self._level):
            return without_tangent(result, name, args, self._level)
        check_pushed(name, result)
        return result


def check_push(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    around: PushContext,
) -> None:
    """Raise Refused for a call whose pushforward is wrong, unless it is computed by a formula."""
    is_mended = func in FORMULAS and name in _KEEPS_STATISTICS
    for fault in () if is_mended or name not in FAULTY else FORWARD_FAULTS:
        if name in fault.names and fault.applies(kwargs, args, around):
            raise Refused(f"torch's forward mode of {name} is wrong here ({fault.reason})")
    if lacks_forward_kernel(func):
        raise Refused(f"the custom operator {func} has no forward rule; torch would give zeros")


def check_pushed(name: str, result: Any) -> None:
    """Raise Refused for a result whose tangent is wrong, which shows only afterwards."""
    if name in _DETERMINANTS and bool((below_transforms(result) == 0).any()):
        raise Refused(f"torch's forward mode of {name} is zero at a singular matrix")


def _asks_for_graph(getter: Any, tensor: torch.Tensor) -> bool:
    """Does the function itself read ``tensor.requires_grad``, which reverse mode makes true?

    It must be true in forward mode, too: functions set hooks where it is. Not so for torch's own
    code, which then looks for a graph; where it looks for the hooks of a module, they are refused.
    """
    if getattr(getter, "__self__", None) is not torch.Tensor.requires_grad:
        return False
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith(f"{__package__}.") and frame.f_back:
        frame = frame.f_back
    if frame.f_globals["__name__"] == torch.utils.hooks.__name__ and is_tracked(tensor):
        raise Refused("torch's forward mode passes by the backward hooks of modules")
    asks_itself = not f"{frame.f_globals['__name__']}.".startswith("torch.")
    return asks_itself and is_tracked(tensor)
