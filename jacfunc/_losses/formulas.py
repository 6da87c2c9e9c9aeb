"""The second derivative of a loss in the outputs by formulas: products with it, and its roots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._lock import kept_property
from jacfunc._types import product_dtype

Settings: TypeAlias = Mapping[str, Any]
"""Settings of a loss, by the names of torch."""

Second: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""New second derivatives of the terms of a loss, from outputs and targets of one dtype."""

AT_ONCE = 2**18
"""Numbers of a product that are computed at once: they fit into a cache."""


@dataclass(frozen=True, eq=False)
class OfNumbers:
    """A diagonal ``H``, of a loss that is a mean or sum of terms, each of one output.

    Args:
        second: gives the second derivatives of the terms, or one number for all of them.
        terms: by how many the sum is divided.
        may_be_negative: by weights of one's own.
    """

    outputs: Tensor
    targets: Tensor
    second: Second
    terms: int
    may_be_negative: bool

    def times(self, vector: Tensor) -> Tensor:
        """``H u``, for u with any dimensions in front of those of the outputs."""
        return (self._diagonal(product_dtype(self.outputs)) * vector).to(vector.dtype)

    def roots(self) -> Tensor | None:
        """``S [B, M, R]`` with ``H = S Sᵀ`` in double precision; None if there is none."""
        diagonal = self._diagonal(torch.float64).expand(self.outputs.shape)
        if self.may_be_negative and (diagonal < 0).any():
            return None
        return diagonal.sqrt().reshape(len(diagonal), -1).diag_embed()

    def _diagonal(self, dtype: torch.dtype) -> Tensor:
        return self.second(self.outputs.to(dtype), self.targets.to(dtype)) / self.terms


@dataclass(frozen=True, eq=False)
class OfClasses:
    """``H`` of a cross entropy: of a row of logits ``a (diag(p) - p pᵀ)``, with their softmax p.

    The factor a is what the row's logarithms are multiplied by. Smoothed labels, weights, targets
    that are ignored, and probabilities for targets change nothing else.

    Args:
        logits: ``[B, C, …]``.
        targets: classes ``[B, …]``, or probabilities like the logits.
    """

    logits: Tensor
    targets: Tensor
    settings: Settings

    def times(self, vector: Tensor) -> Tensor:
        """``H u``, some rows after the other.

        H does not see what all classes of a row have in common: that is taken away first, so that
        nothing cancels where one class is almost certain.
        """
        every, dim = (self.logits, self._factors, vector), 1 - self.logits.dim()
        if vector.numel() <= AT_ONCE:
            return _rows_times(dim, *every).to(vector.dtype)
        product = torch.empty_like(vector)
        for *pieces, into in row_pieces(dim, *every, product):
            into.copy_(_rows_times(dim, *pieces))
        return product

    @kept_property
    def _factors(self) -> Tensor:
        """``a [B, 1, …]``, in the dtype in which products are computed."""
        targets, settings, size = self.targets, self.settings, self.logits.shape[1]
        weight, smoothing = settings["weight"], settings["label_smoothing"]
        dtype, is_mean = product_dtype(self.logits), settings["reduction"] == "mean"
        if weight is None and not targets.is_floating_point():  # smoothed or not, a is the same
            every: Tensor = (targets != settings["ignore_index"]).unsqueeze(1).to(dtype)
            # where all rows are ignored, torch's gradient is zero, though its mean is nan
            return every / every.sum().clamp(min=1) if is_mean else every
        weights = self.logits.new_ones(size, dtype=dtype) if weight is None else weight.to(dtype)
        if targets.is_floating_point():
            by_class = weights.view(-1, *(1,) * (targets.dim() - 2))
            own = (targets * by_class).sum(1, keepdim=True)
            seen, terms = torch.ones_like(own), own.numel()
        else:
            is_seen = (targets != settings["ignore_index"]).unsqueeze(1)
            seen = is_seen.to(dtype)
            own = weights[targets.unsqueeze(1).where(is_seen, 0)] * seen
            terms = own.sum()
        factors: Tensor = own * (1 - smoothing) + seen * (weights.mean() * smoothing)
        return (factors / terms).where(seen != 0, 0) if is_mean else factors

    def roots(self) -> Tensor | None:
        """A triangular factor of ``diag(p) - p pᵀ`` a row, from sums over the first entries of p.

        Nothing is subtracted, so it is exact even for the least likely class. (Tanabe and Sagae,
        "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
        matrix of the multinomial distribution", 1992; here in the reverse order of classes.)
        """
        precise = OfClasses(self.logits.double(), self.targets, self.settings)
        may_be_negative = self.settings["weight"] is not None or self.targets.is_floating_point()
        if may_be_negative and (precise._factors < 0).any():
            return None
        size, classes = self.logits.shape[:2]
        p = precise.logits.reshape(size, classes, -1).softmax(1).mT
        columns = _triangles(p, precise._factors.view(size, -1))
        positions = p.shape[1]
        if positions == 1:
            return columns.squeeze(1)
        blocks = p.new_zeros((size, classes, positions, positions, columns.shape[-1]))
        blocks.diagonal(0, 2, 3).copy_(columns.permute(0, 2, 3, 1))
        return blocks.view(size, classes * positions, -1)


SecondDerivative: TypeAlias = OfNumbers | OfClasses
"""The second derivative ``H`` of a loss at outputs ``[B, *out]``."""


def _rows_times(dim: int, logits: Tensor, factors: Tensor, vector: Tensor) -> Tensor:
    """``H u`` of some rows, new and in the dtype of the factors."""
    p = logits.softmax(dim, dtype=factors.dtype)
    likeliest = p.argmax(dim, keepdim=True).expand_as(vector.narrow(dim, 0, 1))
    u = vector.to(p.dtype)
    # no write: a program that is written down can leave out more where there is none
    u = (u - u.gather(dim, likeliest)) * factors
    # p (u - Σ p u) in one call: the pullback of a softmax
    return torch._softmax_backward_data(u, p.expand_as(u), dim, p.dtype)


def _triangles(p: Tensor, factors: Tensor) -> Tensor:
    """Roots ``[…, C, C]`` for chances ``[…, C]`` and the factors ``[…]`` of rows."""
    if p.shape[-1] < 2:
        return torch.zeros_like(p).unsqueeze(-1)
    sums, least = p.cumsum(-1), torch.finfo(p.dtype).tiny
    share, before = p[..., 1:] / sums[..., 1:].clamp(min=least), sums[..., :-1]
    share *= factors.unsqueeze(-1)
    scales = (share / before.clamp(min=least)).sqrt_()
    columns: Tensor = (p.unsqueeze(-1) * scales.neg_().unsqueeze(-2)).triu_()
    columns.diagonal(-1, -2, -1).copy_(share.mul_(before).sqrt_())
    return columns


def row_pieces(dim: int, *every: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors cut along the longest of their dimensions, into pieces that fit into a cache.

    Args:
        dim: along which they are not cut, from the last.
        every: the first has no dimensions in front of those that all of them have.
    """
    shape = every[0].shape
    longest = max(
        (n - len(shape) for n in range(len(shape)) if n != dim % len(shape)), key=shape.__getitem__
    )
    length = max(1, shape[longest])
    count = max(1, AT_ONCE * length // max(1, *(x.numel() for x in every)))
    if count >= length:
        yield every
    else:
        yield from zip(*(x.split(count, longest) for x in every), strict=True)
