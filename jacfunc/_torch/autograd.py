"""Plain autograd without the checks of its public functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import repeat
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from jacfunc._torch.levels import NOTHING, is_batched
from jacfunc._types import Leaves


class _Recording:
    """Gradients on where they are off, or off where they are on: in two calls of Python's, not ten.

    Args:
        records: are they on inside?
    """

    def __init__(self, records: bool) -> None:
        self._records = records

    def __enter__(self) -> None:
        torch._C._set_grad_enabled(self._records)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(not self._records)


_RECORDING = _Recording(False), _Recording(True)


def recording(records: bool = True) -> AbstractContextManager[Any]:
    """A context in which autograd records, or does not, whatever mode the caller is in."""
    if records and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return NOTHING if torch.is_grad_enabled() == records else _RECORDING[records]


def all_modes() -> list[Any]:
    """The function modes around, the nearest first."""
    return [_get_function_stack_at(n) for n in reversed(range(_len_torch_function_stack()))]


def run_backward(
    outputs: Leaves,
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Leaves,
    create_graph: bool,
    retain_graph: bool = True,
    kinds: Collection[Any] = (),
) -> tuple[Tensor | None, ...]:
    """The products of ``torch.autograd.grad`` with ``allow_unused``.

    Given the ``kinds`` of nodes on the way, it computes in float32 what is slow in half precision.
    A backward pass of a user's may record, as a checkpoint does, which inference mode forbids; and
    it may write into its cotangent, which others share, and later into what it has returned.
    """
    if is_own := any(map(issubclass, kinds, repeat(BackwardCFunction))):
        cotangents = tuple(map(Tensor.clone, cotangents))
    is_slow = not create_graph and _is_slow(outputs, inputs, kinds)
    sweep: Callable[[], tuple[Tensor | None, ...]] = partial(
        _engine_run_backward,
        *(outputs, cotangents, retain_graph, create_graph, inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    if is_own:
        sweep = partial(_in_own_memory, sweep)
    is_inference = torch.is_inference_mode_enabled()
    if not (is_slow or is_inference):  # as most are
        return sweep()
    outside = torch.inference_mode(False) if is_inference else NOTHING
    with outside, _InFloat32() if is_slow else NOTHING:
        return sweep()


def _in_own_memory(sweep: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Products that nobody else may write into; those of many seeds at once are new already."""
    return tuple([x if x is None or is_batched(x) else x.clone() for x in sweep()])


_ATEN: Any = torch.ops.aten
SLOW_IN_HALF: Mapping[str, Any] = {
    "AddmmBackward0": _ATEN.mm.default,
    "MmBackward0": _ATEN.mm.default,
    "BaddbmmBackward0": _ATEN.bmm.default,
    "BmmBackward0": _ATEN.bmm.default,
    "ConvolutionBackward0": _ATEN.convolution_backward.default,
    "SoftmaxBackward0": _ATEN._softmax_backward_data.default,
    "SafeSoftmaxBackward0": _ATEN._softmax_backward_data.default,
    "NativeLayerNormBackward0": _ATEN.native_layer_norm_backward.default,
}
"""Nodes whose backward pass takes up to thirty times as long in half precision on a CPU, and the
operation that takes it. In float32, between two conversions, this takes little more than there."""

_DTYPE = attrgetter("dtype")

MUCH = 2**12
"""Where fewer numbers are pulled back to, a look at each operation takes longer than it spares."""


@cache
def _slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes of half precision in which this CPU has no products of its own."""
    has_onednn, onednn = torch.backends.mkldnn.is_available(), torch.ops.mkldnn
    with _disable_current_modes():  # it is asked once, perhaps while operators are written down
        has_own = {
            torch.float16: has_onednn and onednn._is_mkldnn_fp16_supported(),
            torch.bfloat16: has_onednn and onednn._is_mkldnn_bf16_supported(),
        }
    return frozenset([dtype for dtype, is_fast in has_own.items() if not is_fast])


def _is_slow(
    outputs: Leaves, inputs: Sequence[Tensor | GradientEdge], kinds: Iterable[Any]
) -> bool:
    """Is a node slow in half precision on a CPU, and are many numbers pulled back to?"""
    if _slow_dtypes().isdisjoint(map(_DTYPE, outputs)):  # as in most calls
        return False
    if not any(out.dtype in _slow_dtypes() and out.is_cpu for out in outputs):
        return False
    if not any(kind.__name__ in SLOW_IN_HALF for kind in kinds):
        return False
    return sum(map(_numbers, inputs)) >= MUCH


def _numbers(end: Tensor | GradientEdge) -> int:
    """How many numbers are pulled back to an end of a graph."""
    if isinstance(end, Tensor):
        return end.numel()
    node: Any = end.node
    return prod(node._input_metadata[end.output_nr].shape)


class _InFloat32(TorchDispatchMode):
    """Computes what is slow in half precision on a CPU in float32, and rounds the results.

    They are rounded once, where torch's own kernels may round each step of a sum. What records a
    graph is left as it is: a checkpoint evaluates a part of the user's function there.
    """

    supports_higher_order_operators = True
    _operations = frozenset(SLOW_IN_HALF.values())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, as torch would load its compiler to say so; nothing here is compiled anyway."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_meant = func in self._operations and not kwargs and not torch.is_grad_enabled()
        if not is_meant or not _are_slow(args) or _is_by_weight(func, args):
            return func(*args, **(kwargs or {}))
        dtype = args[0].dtype
        result = func(*[_widened(x, dtype) for x in args])
        if isinstance(result, Tensor):
            return result.to(dtype)
        return tuple([x if x is None else x.to(dtype) for x in result])


def _are_slow(args: tuple[Any, ...]) -> bool:
    """Are all tensors on a CPU, and of one dtype that is slow there?"""
    kinds = {(x.dtype, x.device.type) for x in args if isinstance(x, Tensor)}
    return len(kinds) == 1 and kinds <= {(dtype, "cpu") for dtype in _slow_dtypes()}


def _is_by_weight(func: Any, args: tuple[Any, ...]) -> bool:
    """Is it a convolution's gradient in its weight, or in both?

    In float32 oneDNN's is wrong where a kernel of 16 columns or more covers a whole image.
    """
    return func is _ATEN.convolution_backward.default and bool(args[-1][1])


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """An argument of an operation in float32: a tensor, or the dtype itself."""
    if isinstance(value, Tensor):
        return value.float()
    return torch.float32 if value is dtype else value


untracked: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunction
"""Makes a context in which no watch outside sees operations, for bookkeeping of jacfunc's own.

A watch that looked at each step of it took a tenth of a small network's evaluation.
"""

tracked: Callable[[], AbstractContextManager[Any]] = torch._C._EnableTorchFunction
"""Makes a context inside an untracked one in which modes see operations again."""


def uncast(run: Callable[..., Any], takes_graphs: bool, *inputs: Tensor) -> Any:
    """What a trace returns without autocast, as casts are operators of it, and without a graph."""
    if torch._C._is_any_autocast_enabled() or (takes_graphs and torch.is_grad_enabled()):
        with torch.no_grad(), torch._C._DisableAutocast():
            return run(*inputs)
    return run(*inputs)
