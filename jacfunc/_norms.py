"""Normalization by plain formulas, which are right at every order and under every transform.

Torch's fused kernels keep the statistics of their input. To derivatives of derivatives these are
constants under vmap, in forward mode, and from the third order on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Norm:
    """One call of a fused kernel.

    Args:
        dims: what is averaged over.
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

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the statistics depend on."""
        return (self.input,)

    def is_regular(self) -> bool:
        """Can the formula take the call? Of one value the kernels make what it would not."""
        if not self.is_learning:
            return self.mean is not None and self.variance is not None
        affine = [x.numel() for x in (self.weight, self.bias) if x is not None]
        return prod(self.input.shape[d] for d in self.dims) > 1 and set(affine) <= {
            prod(self.shape)
        }

    def writes(self) -> bool:
        """Does the kernel write into running statistics?"""
        return self.is_learning and self.mean is not None

    def value(self, dtype: torch.dtype) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class WeightNorm:
    """``g · v / ‖v‖``, whose fused backward pass torch differentiates by a wrong formula."""

    v: Tensor
    g: Tensor
    dim: int = 0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the derivative depends on."""
        return self.v, self.g

    def value(self) -> Tensor:
        """By elementary operations, as torch does it where it has no fused kernel."""
        over = [d for d in range(self.v.dim()) if d != self.dim % self.v.dim()]
        square = self.v.square().sum(over if self.dim != -1 else None, keepdim=True)
        return self.v * (self.g / square.sqrt())


_HALVES = (torch.float16, torch.bfloat16)


def by_formula(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_wanted: Callable[[Tensor], bool],
) -> Any:
    """What the kernel returns; its derivatives are those of the formula, where that is wanted."""
    try:
        norm = NORMS[func](*args, **kwargs)
    except TypeError:  # torch says what is wrong with the arguments
        return func(*args, **kwargs)
    if not any(map(is_wanted, norm.inputs)):
        return func(*args, **kwargs)
    if isinstance(norm, WeightNorm):
        return norm.value()
    is_plain = norm.is_regular() and not (norm.writes() or torch.is_autocast_enabled())
    if is_plain and func in _ALONE:
        return norm.value(norm.input.dtype)
    # for what it writes and returns beside the value, for its dtype, and for its errors
    found = func(*args, **kwargs)
    if not norm.is_regular():
        return found
    if isinstance(found, Tensor):
        return norm.value(found.dtype)
    return (norm.value(found[0].dtype), *found[1:])


def _of_layers(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Norm:
    shape = tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    is_right = input.dim() >= len(shape) > 0 and tuple(input.shape[-len(shape) :]) == shape
    return Norm(input, dims if is_right else (), shape, weight, bias, eps)


def _of_batches(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    dims = (0, *range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, training)


def _of_batches_in_torch(
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
    return _of_batches(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _of_batches_alone(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Norm:
    return _of_batches(input, None, None, weight, bias, training, momentum, eps)


def _of_instances(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    dims = tuple(range(2, input.dim()))
    return _of_channels(input, dims, weight, bias, eps, running_mean, running_var, use_input_stats)


def _of_instances_in_torch(
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
    return _of_instances(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _of_channels(input: Tensor, dims: tuple[int, ...], *rest: Any) -> Norm:
    shape = (input.shape[1] if input.dim() > 1 else 0, *(1 for _ in range(2, input.dim())))
    return Norm(input, dims, shape, *rest)


_aten: Any = torch.ops.aten


def _forms(name: str, *overloads: str) -> list[Callable[..., Any]]:
    """What may be called by this name; graphs of torch.fx call overloads."""
    packet = getattr(_aten, name)
    named = [getattr(torch, name)] if hasattr(torch, name) else []
    return [packet, *(getattr(packet, o) for o in overloads or ("default",)), *named]


_ALONE: dict[Any, Callable[..., Norm]] = {
    **dict.fromkeys((F.layer_norm, *_forms("layer_norm")), _of_layers),
    F.batch_norm: _of_batches,
    **dict.fromkeys(_forms("batch_norm"), _of_batches_in_torch),
    F.instance_norm: _of_instances,
    **dict.fromkeys(_forms("instance_norm"), _of_instances_in_torch),
}
"""Kernels that return the value alone."""
NORMS: dict[Any, Callable[..., Norm | WeightNorm]] = {
    **_ALONE,
    **dict.fromkeys(_forms("native_layer_norm"), _of_layers),
    **dict.fromkeys(_forms("native_batch_norm"), _of_batches_in_torch),
    **dict.fromkeys(_forms("_native_batch_norm_legit"), _of_batches_in_torch),
    **dict.fromkeys(_forms("_native_batch_norm_legit_functional"), _of_batches_in_torch),
    _aten._native_batch_norm_legit.no_stats: _of_batches_alone,
    **dict.fromkeys(_forms("_weight_norm"), WeightNorm),
}
"""How their arguments are read."""
