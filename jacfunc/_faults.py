"""Where torch's backward passes are wrong, in tables: which sweep, and what to do.

The names are of autograd nodes: found in the graph, they turn a vmapped sweep into a row loop,
which is right, or refuse. What leaves no node is watched for while the function runs. Each entry
is pinned by a test in ``tests/test_faults.py``, and ``tests/test_opinfo.py`` and
``tests/test_coverage.py`` look for more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._check import Refused, is_differentiable, is_tensor
from jacfunc._functorch import is_batched, is_tracked, lacks_forward_rule, num_vmap_levels
from jacfunc._tree import flatten

NEVER_BATCHED = frozenset(
    {
        "CdistBackward0",  # its batching rule gives wrong rows
        "CompiledFunctionBackward",  # inductor's graphs refuse batched cotangents
    }
)
NOT_BATCHED_IF_DIFFERENTIATED = frozenset(
    # vmapped over cotangents these backwards treat the saved statistics as constants
    {
        "NativeLayerNormBackward0",
        "NativeBatchNormBackward0",
        "NativeBatchNormLegitBackward0",
        "NativeBatchNormLegitBackward1",
        "CudnnBatchNormBackward0",
        "MiopenBatchNormBackward0",
        "FusedRmsNormBackward0",
        "LinalgDetBackward0",  # nan where singular values coincide
    }
)


WRONG_BACKWARD = {
    "CrossMapLRN2dBackward": "it leaves out the other channels",
}
WRONG_INSIDE_VMAP = {
    "LinalgLuSolveBackward0": "inside an outer vmap it misreads memory",
}
WRONG_SECOND_DERIVATIVE = {
    "CondAutogradOpBackward": "control flow operators drop it",
    "ScanAutogradOpBackward": "control flow operators drop it",
    "WhileLoopAutogradOpBackward": "control flow operators drop it",
    "WeightNormInterfaceBackward0": "its formula is wrong",
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse tensors made from values drop it",
}


def check_nodes(nodes: set[Any], differentiated: bool) -> None:
    """Refuse graphs whose pullback comes out wrong, however it is swept.

    Raises:
        Refused: if there is such a node.
    """
    for node in nodes:
        name = node.__name__
        reason = WRONG_BACKWARD.get(name)
        if num_vmap_levels() and reason is None:
            reason = WRONG_INSIDE_VMAP.get(name)
        if reason:
            raise Refused(f"torch's backward pass of {name} is wrong here ({reason})")
        if differentiated and _is_once_differentiable(node):
            reason = "its backward is marked once_differentiable"
        elif differentiated:
            reason = WRONG_SECOND_DERIVATIVE.get(name)
        if reason:
            raise Refused(f"torch's second derivative through {name} is wrong ({reason})")


def _is_once_differentiable(node: Any) -> bool:
    """Torch raises where it notices, and returns zeros where the cotangent carries no graph."""
    function = getattr(node, "_forward_cls", None)
    code = getattr(getattr(function, "backward", None), "__code__", None)
    return code is not None and code.co_qualname.startswith("once_differentiable.")


def can_be_batched(nodes: set[str], differentiated: bool) -> bool:
    """Is a pullback through these autograd nodes right under vmap?"""
    if nodes & NEVER_BATCHED:
        return False
    return not (differentiated and nodes & NOT_BATCHED_IF_DIFFERENTIATED)


def must_be_differentiable(nodes: set[str], in_functorch: bool) -> bool:
    """Must the backward formulas be the differentiable ones, although nobody differentiates them?

    The others, taken when grad mode is off, solve by saved LU factors: under vmap that misreads
    memory. That of det is zero at a singular matrix.
    """
    if in_functorch:
        return any(name.startswith("Linalg") for name in nodes)
    return "LinalgDetBackward0" in nodes


# --- while the function runs ---

_Args = tuple[Any, ...]
_Rule = Callable[[Callable[..., Any], _Args, Mapping[str, Any]], Any]


def _refuse_if_tracked(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    if any(map(_is_tracked_now, _tensors(args, kwargs))):
        name = getattr(func, "__name__", str(func)).removeprefix("special_").partition(".")[0]
        raise Refused(f"torch has no derivative of {name} and takes it for a constant")
    return func(*args, **kwargs)


def _sinc(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    """By a formula of our own where it is differentiated: torch's has a pole of its own at 0."""
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if "out" in kwargs or not is_differentiable(x) or x.is_complex() or not _is_tracked_now(x):
        return func(*args, **kwargs)
    # torch rounds half precision once, at the end
    value = sinc(x if x.dtype in (torch.float32, torch.float64) else x.float()).to(x.dtype)
    return x.copy_(value) if func is Tensor.sinc_ else value


def sinc(x: Tensor) -> Tensor:
    """``sin(πx) / πx``, by its power series near 0: there the quotient cancels once derived."""
    angle = torch.pi * x
    is_near = angle.abs() < 1
    # outside its own half each branch gets what can't spoil the derivatives of the other
    square = torch.where(is_near, angle, 0.0).square()
    far = torch.where(is_near, 1.0, angle)
    series = torch.ones_like(x)
    for n in range(_TERMS, 0, -1):
        series = 1 - square / (2 * n * (2 * n + 1)) * series
    return torch.where(is_near, series, far.sin() / far)


_TERMS = 11
"""Of the series, the last below the rounding of float64 in the second derivative, too."""


def _is_tracked_now(tensor: Tensor) -> bool:
    """Compilers can't be asked."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and is_tracked(tensor)


def _tensors(args: _Args, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return list(filter(is_tensor, flatten((args, dict(kwargs)))[0]))


def _forms(name: str) -> list[Callable[..., Any]]:
    """What is met when it is called by this name; graphs of torch.fx call overloads."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    places = (torch, torch.special, Tensor)
    named = [getattr(place, name.removeprefix("special_"), None) for place in places]
    return [packet, *overloads, *filter(None, named)]


CONSTANT_TO_TORCH = (
    *("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"),
    *(f"modified_bessel_{kind}" for kind in ("i0", "i1", "k0", "k1")),
    *(f"scaled_modified_bessel_{kind}" for kind in ("k0", "k1")),
    *(f"{shifted}chebyshev_polynomial_{k}" for shifted in ("", "shifted_") for k in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he"),
    *("laguerre_polynomial_l", "legendre_polynomial_p"),
)
RULES: dict[Callable[..., Any], _Rule] = {
    **{f: _refuse_if_tracked for name in CONSTANT_TO_TORCH for f in _forms(f"special_{name}")},
    **dict.fromkeys((*_forms("sinc"), Tensor.sinc_), _sinc),
}
"""What is done instead of a call."""

_OF_A_TRANSFORM = ("vmap", "functorch", "that doesn't have storage")


class Watch(TorchFunctionMode):
    """Watches a function while it runs, for what its graph does not show.

    What runs inside a ``torch.jit`` function, or compiled, can't be watched.
    """

    _caught: Any = None

    def __enter__(self) -> Self:
        torch._C._push_on_torch_function_stack(self)  # as torch does, in fewer steps
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: _Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # met by every operation: as short as it can be
        try:
            if func not in RULES:
                return func(*args, **kwargs) if kwargs else func(*args)
            return RULES[func](func, args, kwargs or {})
        except (RuntimeError, IndexError) as error:
            self.remember(error, args, kwargs or {})
            raise

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        torch._C._pop_torch_function_stack()
        caught, self._caught = error or self._caught, None
        if caught is None:
            return
        # a watch outside has seen it, too, but what is done about it is no longer the function's
        caught.left_a_watch = True
        if error is None:
            if isinstance(caught, Refused):
                raise caught
            raise Refused(f"func goes on after an error that it caught: {caught}") from caught

    def remember(self, error: Any, args: _Args, kwargs: Mapping[str, Any]) -> None:
        """Errors that a sample alone, without our transforms, may not have raised."""
        if torch.compiler.is_compiling() or hasattr(error, "left_a_watch"):
            return
        is_ours = isinstance(error, Refused) or lacks_forward_rule(error)
        is_ours = is_ours or any(words in str(error) for words in _OF_A_TRANSFORM)
        if is_ours or any(map(is_batched, _tensors(args, kwargs))):
            self._caught = error
