"""Plain formulas in place of torch's kernels, right at every order and under every transform.

Torch's fused normalizations keep the statistics of their input. Under vmap, in forward mode, and
from the third order on, torch takes these for constants when it differentiates again. Each entry is
pinned by a test in ``tests/faults/test_nesting.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._faults.kernels import (
    FromOneColumn,
    ToOneColumn,
    in_torch,
    of_batches,
    of_batches_alone,
    of_instances,
    of_layers,
)
from jacfunc._faults.lookups import forms
from jacfunc._torch import (
    below_transforms,
    is_pushing,
    is_traced,
    num_derivatives,
    num_vmap_levels,
)


class IsDerivedAgain(Protocol):
    """Tells of a tensor whether its derivative is differentiated in turn.

    It is False where torch's second derivative is right for most kernels, unless ``ever``.
    """

    def __call__(self, tensor: Tensor, ever: bool = False) -> bool: ...


class Formula(Protocol):
    """One call of a kernel, that can be computed by a formula."""

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """Would the kernel's derivatives be wrong here?"""

    def result(self, kernel: Callable[[], Any]) -> Any:
        """What the kernel returns, computed by the formula."""


def formula_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Formula | None:
    """The formula of a call; None for wrong arguments, of which torch says what is wrong."""
    try:
        return FORMULAS[func](*args, **kwargs)
    except TypeError:
        return None


@dataclass(frozen=True, slots=True)
class WeightNorm:
    """``g · v / ‖v‖``; of the kernel torch has no forward mode and a wrong second derivative."""

    v: Tensor
    g: Tensor
    dim: int = 0

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """Always."""
        return True

    def result(self, kernel: Callable[[], Any]) -> Tensor:
        """The formula that torch uses where it has no kernel."""
        dims = [d for d in range(self.v.dim()) if d != self.dim % self.v.dim()]
        square = self.v.square().sum(None if self.dim == -1 else dims, keepdim=True)
        return self.v * (self.g / square.sqrt())


@dataclass(frozen=True, slots=True)
class Determinant:
    """``sign · exp(log |det|)``, as torch's third derivatives are nan or wrong in transforms."""

    A: Tensor

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """If it is differentiated again: the first derivative is right."""
        return is_derived_again(self.A)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The formula; the kernel if the matrix of any sample is singular."""
        determinant = kernel()
        if bool((below_transforms(determinant) == 0).any()):
            return determinant
        sign, logarithm = torch.linalg.slogdet(self.A)
        return sign * logarithm.exp()


@dataclass(frozen=True, slots=True)
class Distances:
    """Norms of differences, as the pullback of cdist is wrong under vmap."""

    x1: Tensor
    x2: Tensor
    p: float = 2.0
    compute_mode: str | int | None = None

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """If it is pulled back under vmap; forward mode torch refuses itself."""
        if is_pushing() or not num_vmap_levels():
            return False
        return any(num_derivatives(x) > 0 for x in (self.x1, self.x2))

    def result(self, kernel: Callable[[], Any]) -> Tensor:
        """The distances of all pairs."""
        difference = self.x1.unsqueeze(-2) - self.x2.unsqueeze(-3)
        distances: Tensor = torch.linalg.vector_norm(difference, self.p, -1)
        return distances


@dataclass(frozen=True, slots=True)
class RunningLogSum:
    """``m + log Σ exp(x - m)``: torch's pullback loses what comes from cotangents that are zero."""

    x: Tensor
    dim: int

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """If it is differentiated again: the first derivative is right."""
        if not (self.x.dim() and self.x.numel() and self.x.is_floating_point()):
            return False
        return is_derived_again(self.x, ever=True)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The formula; of all terms of each sum, where some vanish beside others."""
        x = self.x
        if is_traced() or self._has_small(kernel()):
            return _before_each(x, self.dim, -math.inf).logsumexp(-1).movedim(-1, self.dim)
        m = x.amax(self.dim, keepdim=True)
        return m + (x - m).exp().cumsum(self.dim).log()

    def _has_small(self, total: Tensor) -> bool:
        values, smallest = below_transforms(total), 2 * torch.finfo(total.dtype).tiny ** 0.5
        return not bool((values - below_transforms(self.x).max() > math.log(smallest)).all())


@dataclass(frozen=True, slots=True)
class RunningProduct:
    """Products of all entries before each: torch's forward formula is not differentiable at 0."""

    x: Tensor
    dim: int
    dtype: torch.dtype | None = None

    def is_needed(self, is_derived_again: IsDerivedAgain) -> bool:
        """If tangents are pushed, and these are differentiated."""
        return is_pushing() and bool(self.x.dim()) and is_derived_again(self.x, ever=True)

    def result(self, kernel: Callable[[], Any]) -> Any:
        """The formula; the kernel if no entry is zero."""
        if not is_traced() and bool((below_transforms(self.x) != 0).all()):
            return kernel()
        x = self.x.to(self.dtype or self.x.dtype)
        return _before_each(x, self.dim, 1).prod(-1).movedim(-1, self.dim)


def _before_each(x: Tensor, dim: int, neutral: float) -> Tensor:
    """For each entry along a dimension all up to it, in the last one, and neutral numbers."""
    x = x.movedim(dim, -1)
    is_before = torch.ones((x.shape[-1],) * 2, dtype=torch.bool, device=x.device).tril()
    return torch.where(is_before, x.unsqueeze(-2), neutral)


FORMULAS: dict[Any, Callable[..., Formula]] = {
    **dict.fromkeys((F.layer_norm, *forms("layer_norm")), of_layers),
    **dict.fromkeys(forms("native_layer_norm"), of_layers),
    F.batch_norm: of_batches,
    **dict.fromkeys((*forms("batch_norm"), *forms("native_batch_norm")), in_torch(of_batches)),
    **dict.fromkeys(forms("_native_batch_norm_legit"), in_torch(of_batches)),
    **dict.fromkeys(forms("_native_batch_norm_legit_functional"), in_torch(of_batches)),
    torch.ops.aten._native_batch_norm_legit.no_stats: of_batches_alone,
    F.instance_norm: of_instances,
    **dict.fromkeys(forms("instance_norm"), in_torch(of_instances)),
    **dict.fromkeys(forms("_weight_norm"), WeightNorm),
    **dict.fromkeys((*forms("det"), *forms("linalg_det"), torch.linalg.det), Determinant),
    **dict.fromkeys(forms("logcumsumexp"), RunningLogSum),
    **dict.fromkeys(forms("cumprod"), RunningProduct),
    torch.conv2d: ToOneColumn,
    torch.conv_transpose2d: FromOneColumn,
    **dict.fromkeys(forms("cdist"), Distances),
}
"""For each kernel what reads the arguments of a call, and makes a formula of them."""

PRODUCTS = frozenset({F.linear, torch.conv1d, torch.conv2d, torch.conv3d})
"""Functions of two factors, in each of which they are linear, and of what is added to that."""
