"""Where torch's forward mode is wrong, in one table, and the watch that refuses it.

The names are of functions, met while tangents pass through. Each entry is pinned by a test in
``tests/test_faults.py``, and ``tests/test_opinfo.py`` and ``tests/test_coverage.py`` look for more.
What runs inside a ``torch.jit`` function can't be watched: there a fault goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from jacfunc._check import Refused, is_differentiable
from jacfunc._functorch import (
    below_transforms,
    constant,
    has_tangent,
    is_second_order_forward,
)


@dataclass(frozen=True)
class ForwardFault:
    """Functions whose pushforward is wrong, when, and why."""

    names: frozenset[str]
    applies: Callable[[dict[str, Any], tuple[Any, ...], int], bool]
    reason: str


def _with_prod(kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int) -> bool:
    return "prod" in args or kwargs.get("reduce") == "prod"


def _always(kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int) -> bool:
    return True


def _with_options(kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int) -> bool:
    return kwargs.get("options") is not None


def _with_gradient_convention(
    kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int
) -> bool:
    given = dict(zip(_EMBEDDING_ARGUMENTS, args, strict=False)) | kwargs
    padding = given.get("padding_idx")
    if padding is not None and _occurs(padding, given["input"], len(given["weight"])):
        return True
    return bool(given.get("scale_grad_by_freq"))


def _occurs(padding: int, indices: torch.Tensor, size: int) -> bool:
    return bool((below_transforms(indices) == padding % size).any())


def _under_vmap(kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int) -> bool:
    return outer_vmaps > 0


def _at_second_order(kwargs: dict[str, Any], args: tuple[Any, ...], outer_vmaps: int) -> bool:
    tensors = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor))
    return is_second_order_forward(tensors)


_EMBEDDING_ARGUMENTS = (
    *("input", "weight", "padding_idx"),
    *("max_norm", "norm_type", "scale_grad_by_freq"),
)
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
        "custom_function_call",  # an autograd.Function with a jvp of its own
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
        _LU_SOLVES | _KEEPS_STATISTICS,
        _at_second_order,
        "its forward derivative keeps saved factors or statistics constant, "
        "so derivatives of it are wrong",
    ),
)


class ForwardGuard(TorchFunctionMode):
    """Watches a function while tangents pass through it; refuses what would come out wrong."""

    def __init__(self, outer_vmaps: int) -> None:
        super().__init__()
        self._outer_vmaps = outer_vmaps
        self._is_recording = torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # graphs of torch.fx and torch.export call overloads, decomposed ones under private names
        name = getattr(func, "_opname", getattr(func, "__name__", "")).lstrip("_")
        if name == "register_hook":
            raise Refused("torch's forward mode passes by the hooks of tensors")
        for fault in FORWARD_FAULTS:
            if name in fault.names and fault.applies(kwargs, args, self._outer_vmaps):
                raise Refused(f"torch's forward mode of {name} is wrong here ({fault.reason})")
        if isinstance(func, torch._ops.OpOverload) and _lacks_forward_rule(func):
            raise Refused(f"the custom operator {func} has no forward rule; torch would give zeros")
        result = func(*args, **kwargs)
        if self._is_recording and not torch.is_grad_enabled() and is_differentiable(result):
            return without_tangent(result, name, args)
        if name in _DETERMINANTS and bool((below_transforms(result) == 0).any()):
            raise Refused(f"torch's forward mode of {name} is zero at a singular matrix")
        return result


def without_tangent(result: torch.Tensor, name: str, args: tuple[Any, ...]) -> torch.Tensor:
    """What is computed under torch.no_grad() is a constant to reverse mode, so to forward mode."""
    if name.endswith("_") and not name.endswith("__") and has_tangent(args[0]):
        raise Refused(f"torch's forward mode goes on through torch.no_grad(), here through {name}")
    return constant(result)


def _lacks_forward_rule(op: torch._ops.OpOverload) -> bool:
    """Operators of ``torch.library.custom_op`` register a backward alone."""
    if op.namespace in {"aten", "prim", "prims", "profiler"}:
        return False
    name = op._schema.name
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not has_kernel(name, "CompositeImplicitAutograd")
