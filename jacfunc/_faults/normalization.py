"""Normalizations by elementary operations, and how the calls of their kernels are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization.

    Args:
        dims: what is averaged over; nothing, where torch refuses the call.
        shape: of weight, bias and running statistics, as they lie beside the input.
        mean, variance: running statistics.
        is_learning: are the statistics those of the input?
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
        """The statistics depend on the input alone."""
        return is_derived_again(self.input)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """Beside the value, the kernel's own: statistics, and what it writes."""
        found = kernel()
        if not self._is_regular():
            return found
        if isinstance(found, Tensor):
            return self._value(found.dtype)
        return (self._value(found[0].dtype), *found[1:])

    def _is_regular(self) -> bool:
        """Of one value the kernels make what the formula would not, and they check shapes."""
        if not self.is_learning:
            return self.mean is not None and self.variance is not None
        return prod(self.input.shape[d] for d in self.dims) > 1

    def _value(self, dtype: torch.dtype) -> Tensor:
        """By elementary operations: of half precision in single precision, as torch does it."""
        x = self.input.float() if self.input.dtype in _HALVES else self.input
        if self.is_learning:
            centred = x - x.mean(self.dims, keepdim=True)
            variance = centred.square().mean(self.dims, keepdim=True)
        else:
            assert self.mean is not None
            assert self.variance is not None
            # torch has no derivative in them
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
    """``F.layer_norm`` and those of torch."""
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
    """``F.batch_norm``."""
    dims = (0, *range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, training)


def of_batches_in_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Norm:
    """Those of torch."""
    return of_batches(input, running_mean, running_var, weight, bias, training, momentum, eps)


def of_batches_alone(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Norm:
    """Those without running statistics."""
    return of_batches(input, None, None, weight, bias, training, momentum, eps)


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
    """``F.instance_norm``."""
    dims = tuple(range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, use_input_stats)


def of_instances_in_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Norm:
    """That of torch."""
    return of_instances(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _of_channels(input: Tensor, dims: tuple[int, ...], *rest: Any) -> Norm:
    shape = (input.shape[1] if input.dim() > 1 else 0, *(1 for _ in range(2, input.dim())))
    return Norm(input, dims, shape, *rest)
