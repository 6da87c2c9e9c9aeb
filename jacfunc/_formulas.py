"""Plain formulas, right at every order and under every transform, for kernels that are not.

Torch's fused normalizations keep the statistics of their input: to derivatives of derivatives these
are constants under vmap, in forward mode, and from the third order on. Each entry is pinned by a
test in ``tests/test_nesting.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._functorch import below_transforms, is_pushing, num_vmap_levels
from jacfunc._orders import num_derivatives

_HALVES = (torch.float16, torch.bfloat16)


class Formula(Protocol):
    """One call of a kernel, as its arguments were read."""

    def is_needed(self, is_derived_again: Callable[[Tensor], bool]) -> bool:
        """Would the kernel's derivatives be wrong here?"""

    def result(self, kernel: Callable[[], Any]) -> Any:
        """What the kernel returns, by the formula."""


def by_formula(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_derived_again: Callable[[Tensor], bool],
) -> Any:
    """What ``func`` returns; its derivatives are those of a formula, where they must be."""

    def kernel() -> Any:
        return func(*args, **kwargs)

    try:
        formula = FORMULAS[func](*args, **kwargs)
    except TypeError:  # torch says what is wrong with the arguments
        return kernel()
    return formula.result(kernel) if formula.is_needed(is_derived_again) else kernel()


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


@dataclass(frozen=True, slots=True)
class WeightNorm:
    """``g · v / ‖v‖``: torch's second derivative is wrong, and the kernel can't be batched."""

    v: Tensor
    g: Tensor
    dim: int = 0

    def is_needed(self, is_derived_again: Callable[[Tensor], bool]) -> bool:
        """Always: inside transforms the first derivative is refused already."""
        return True

    def result(self, kernel: Callable[[], Any]) -> Tensor:
        """As torch does it where it has no kernel."""
        dims = [d for d in range(self.v.dim()) if d != self.dim % self.v.dim()]
        square = self.v.square().sum(None if self.dim == -1 else dims, keepdim=True)
        return self.v * (self.g / square.sqrt())


@dataclass(frozen=True, slots=True)
class Determinant:
    """``sign · exp(log |det|)``: third derivatives of det are nan or wrong inside transforms."""

    A: Tensor

    def is_needed(self, is_derived_again: Callable[[Tensor], bool]) -> bool:
        """The first derivative is right."""
        return is_derived_again(self.A)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """By the kernel where the matrix, of some sample, is singular."""
        found = kernel()
        if bool((below_transforms(found) == 0).any()):
            return found
        sign, logarithm = torch.linalg.slogdet(self.A)
        return sign * logarithm.exp()


@dataclass(frozen=True, slots=True)
class Distances:
    """Norms of differences: the pullback of cdist is wrong under vmap."""

    x1: Tensor
    x2: Tensor
    p: float = 2.0
    compute_mode: str | int | None = None

    def is_needed(self, is_derived_again: Callable[[Tensor], bool]) -> bool:
        """In forward mode it is refused by torch."""
        if is_pushing() or not num_vmap_levels():
            return False
        return any(num_derivatives(x) > 0 for x in (self.x1, self.x2))

    def result(self, kernel: Callable[[], Any]) -> Tensor:
        """Of all pairs."""
        difference = self.x1.unsqueeze(-2) - self.x2.unsqueeze(-3)
        distances: Tensor = torch.linalg.vector_norm(difference, self.p, -1)
        return distances


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


FORMULAS: dict[Any, Callable[..., Formula]] = {
    **dict.fromkeys((F.layer_norm, *_forms("layer_norm")), _of_layers),
    **dict.fromkeys(_forms("native_layer_norm"), _of_layers),
    F.batch_norm: _of_batches,
    **dict.fromkeys(_forms("batch_norm"), _of_batches_in_torch),
    **dict.fromkeys(_forms("native_batch_norm"), _of_batches_in_torch),
    **dict.fromkeys(_forms("_native_batch_norm_legit"), _of_batches_in_torch),
    **dict.fromkeys(_forms("_native_batch_norm_legit_functional"), _of_batches_in_torch),
    _aten._native_batch_norm_legit.no_stats: _of_batches_alone,
    F.instance_norm: _of_instances,
    **dict.fromkeys(_forms("instance_norm"), _of_instances_in_torch),
    **dict.fromkeys(_forms("_weight_norm"), WeightNorm),
    **dict.fromkeys((*_forms("det"), *_forms("linalg_det"), torch.linalg.det), Determinant),
    **dict.fromkeys((Tensor.det,), Determinant),
    **dict.fromkeys((torch.cdist, _aten.cdist.default, _aten.cdist), Distances),
}
"""How the arguments of a call are read."""
