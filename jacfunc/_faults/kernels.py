"""Normalizations by elementary operations, and convolutions that oneDNN does right.

They are made from the arguments of torch's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Norm:
    """One call of a normalization.

    Args:
        dims: dimensions that are averaged over; none if torch refuses the call.
        shape: the shape in which weight, bias and running statistics are broadcast to the input.
        mean, variance: running statistics.
        is_learning: are the statistics taken of the input?
    """

    input: Tensor
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    mean: Tensor | None = None
    variance: Tensor | None = None
    is_learning: bool = True

    def is_needed(self, is_derived_again: Callable[[Tensor], bool]) -> bool:
        """If the input is differentiated again: the statistics depend on it alone."""
        return is_derived_again(self.input)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The value by the formula; the statistics, and what is written, by the kernel."""
        results = kernel()
        if not self.is_regular:
            return results
        if isinstance(results, Tensor):
            return self.value(results.dtype)
        return (self.value(results[0].dtype), *results[1:])

    @property
    def writes(self) -> bool:
        """May it write running statistics?"""
        return self.is_learning and self.mean is not None

    @property
    def is_regular(self) -> bool:
        """Does the formula agree with the kernel? Not where it averages over a single value."""
        if not self.is_learning:
            return self.mean is not None and self.variance is not None
        return prod(self.input.shape[d] for d in self.dims) > 1

    def value(self, dtype: torch.dtype) -> Tensor:
        """The normalized input; half precision is computed in single precision, as in torch."""
        x = self.input.float() if self.input.dtype in _HALVES else self.input
        if self.is_learning:
            centred = x - x.mean(self.dims, keepdim=True)
            variance = centred.square().mean(self.dims, keepdim=True)
        else:
            assert self.mean is not None
            assert self.variance is not None
            # torch has no derivative by running statistics
            centred = x - self.mean.detach().view(self.shape)
            variance = self.variance.detach().view(self.shape)
        result = centred * (variance + self.eps).rsqrt()
        if self.weight is not None:
            result = result * self.weight.view(self.shape)
        if self.bias is not None:
            result = result + self.bias.view(self.shape)
        return result.to(dtype)


def of_layers(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Norm:
    """A call of ``F.layer_norm``, ``torch.layer_norm`` or ``torch.native_layer_norm``."""
    shape = tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    is_right = input.dim() >= len(shape) > 0 and tuple(input.shape[-len(shape) :]) == shape
    return Norm(input, dims if is_right else (), shape, weight, bias, eps)


def of_batches(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    """A call of ``F.batch_norm``."""
    dims = (0, *range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, training)


def of_batches_alone(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any, **named: Any
) -> Norm:
    """A call of a batch norm without running statistics."""
    return of_batches(input, None, None, weight, bias, *others, **named)


def of_instances(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    """A call of ``F.instance_norm``."""
    dims = tuple(range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, use_input_stats)


def in_torch(read: Callable[..., Norm]) -> Callable[..., Norm]:
    """What reads calls of ``torch.batch_norm`` and the like, by what reads those of ``F``.

    Torch's own functions take weight and bias before the running statistics.
    """

    def read_in_torch(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *others: Any,
        cudnn_enabled: bool = True,
        **named: Any,
    ) -> Norm:
        return read(input, running_mean, running_var, weight, bias, *others[:3], **named)

    return read_in_torch


def _of_channels(input: Tensor, dims: tuple[int, ...], *rest: Any) -> Norm:
    shape = (input.shape[1] if input.dim() > 1 else 0, *(1 for _ in range(2, input.dim())))
    return Norm(input, dims, shape, *rest)


LARGE_KERNEL = 8
"""Seen from 14 columns, and 15 rows and 16 channels, on."""


@dataclass(frozen=True, slots=True)
class ToOneColumn:
    """One column more, which is cut off: of one, oneDNN's pullback to a large kernel is wrong."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def is_needed(self, is_derived_again: Any) -> bool:
        """If a large kernel covers all columns of images in float32, and these have channels."""
        is_covered = self.input.shape[-1:] == self.weight.shape[-1:] and self.padding in _NONE
        return is_covered and self.groups == 1 and _is_large(self.input, self.weight)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The columns but for the last one."""
        rows = self.stride if isinstance(self.stride, int) else self.stride[0]
        how = (rows, 1), self.padding, self.dilation
        return torch.conv2d(F.pad(self.input, (0, 1)), self.weight, self.bias, *how)[..., :1]


@dataclass(frozen=True, slots=True)
class FromOneColumn:
    """One column more, whose results are cut off: of one, the pullback to the kernel is wrong."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    output_padding: Any = 0
    groups: int = 1
    dilation: Any = 1

    def is_needed(self, is_derived_again: Any) -> bool:
        """If there is one column, in float32."""
        is_one = self.input.shape[-1:] == (1,)
        return is_one and self.groups == 1 and _is_large(self.input, self.weight)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The columns but for those of another one, which is zero."""
        more = self.stride if isinstance(self.stride, int) else self.stride[-1]
        how = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        both = torch.conv_transpose2d(F.pad(self.input, (0, 1)), self.weight, self.bias, *how)
        return both[..., :-more]


_NONE: Any = (0, (0,), (0, 0), [0], [0, 0], "valid")
"""Ways to say that nothing is padded."""


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Is it a large kernel of many channels, on a CPU?"""
    is_plain = x.dtype is torch.float32 and x.is_cpu and weight.dim() == 4
    return is_plain and min(weight.shape[1:]) >= LARGE_KERNEL
