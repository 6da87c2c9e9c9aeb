"""Functions written in functions that have rules: normalizations, statistics, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST_FACTORS = 64
"""Factors of a product that is taken in pairs."""


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(input * (input.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    size, channels, *rest = input.shape
    result = _normal(input.reshape(size, num_groups, -1), (-1,), eps).reshape(input.shape)
    shape = (channels, *(1 for _ in rest))
    weight, bias = (None if x is None else x.reshape(shape) for x in (weight, bias))
    return _scaled(result, weight, bias)


def _normal(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def var(
    input: Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = _dims(input, dim)
    correction = int(unbiased) if correction is None else correction
    count = math.prod(input.shape[d] for d in dims)
    centred = input - input.mean(dims, keepdim=True)
    return centred.square().sum(dims, keepdim=keepdim) / (count - correction)


def std(*args: Any, **named: Any) -> Tensor:
    return var(*args, **named).sqrt()


def _dims(x: Tensor, dim: Any) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    dims = _dims(x, dim)
    if ord == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    if ord == float("inf"):
        return x.abs().amax(dims, keepdim=keepdim)
    if ord != 2:
        raise NotImplementedError(f"its order is {ord}")
    return _root(x.square().sum(dims, keepdim=keepdim))


def _root(x: Any) -> Tensor:
    """The square root of a sum of squares; what is zero along all directions stays a constant.

    So a particle has the distance 0 to itself, wherever it is.
    """
    is_zero = (x.value == 0) & (x.first == 0).all(0)
    if x.second is not None:
        is_straight = x.second == 0
        is_zero = is_zero & (
            is_straight if is_straight.dim() == x.value.dim() else is_straight.all(0)
        )
    root: Tensor = torch.where(is_zero, torch.zeros_like(x), torch.where(is_zero, 1.0, x).sqrt())
    return root


def norm(
    input: Tensor,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Tensor:
    return vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)


def linalg_norm(
    A: Tensor,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    is_matrix = ord is not None and (A.dim() > 1 if dim is None else not isinstance(dim, int))
    if is_matrix and ord != "fro":
        raise NotImplementedError("it is a norm of matrices")
    return vector_norm(A, 2 if ord in ("fro", None) else ord, dim, keepdim, dtype=dtype)


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    return input / vector_norm(input, p, dim, keepdim=True).clamp_min(eps)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    weight: None = None,
) -> Tensor:
    if (size_average, reduce, weight) != (None, None, None):
        raise NotImplementedError("it has options of old")
    squares = (input - target).square()
    if reduction == "none":
        return squares
    return squares.mean() if reduction == "mean" else squares.sum()


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = mat1 @ mat2 if alpha == 1 else alpha * (mat1 @ mat2)
    return product + (input if beta == 1 else beta * input)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or enable_gqa:
        raise NotImplementedError("it drops weights, or shares heads")
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * tensor1 * tensor2


def prod(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    parts = input.flatten().unbind() if dim is None else input.unbind(dim)
    if not 0 < len(parts) <= MOST_FACTORS:
        raise NotImplementedError(f"it has {len(parts)} factors")
    while len(parts) > 1:
        last = parts[-1:] if len(parts) % 2 else ()
        parts = (*[a * b for a, b in zip(parts[::2], parts[1::2], strict=False)], *last)
    return parts[0] if dim is None or not keepdim else parts[0].unsqueeze(dim)


def logaddexp(input: Tensor, other: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(input.shape, other.shape)
    return torch.logsumexp(torch.stack((input.expand(shape), other.expand(shape))), 0)


def hypot(input: Tensor, other: Tensor) -> Tensor:
    return _root(input.square() + other.square())


def lerp(input: Tensor, end: Tensor, weight: Any) -> Any:
    return input + weight * (end - input)
