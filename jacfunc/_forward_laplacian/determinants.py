"""Rules of determinants, inverses and solutions of linear systems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacfunc._forward_laplacian.jet import Args, Kwargs, Propagation


def slogdet(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``(log |det A|)' = tr A⁻¹A'``, ``'' = tr A⁻¹A'' - tr (A⁻¹A')²``; the sign is a constant."""
    (matrix,) = args or (kwargs["A"],)
    result = func(matrix.value)
    return type(result)((result[0].detach(), _logarithm(ctx, matrix, result[1])))


def logdet(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The logarithm of a determinant."""
    (matrix,) = args
    return _logarithm(ctx, matrix, func(matrix.value))


def _logarithm(ctx: Propagation, matrix: Any, value: Tensor) -> Any:
    inverse = torch.linalg.inv(matrix.value)
    turned = inverse @ matrix.first
    second = -ctx.summed((turned * turned.mT).sum((-2, -1)))
    if matrix.second is not None:
        second = second + _trace(inverse @ matrix.second)
    return ctx.jet(value, _trace(turned), second)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def inv(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Of ``A Y = 1``: ``Y' = -Y A' Y``, ``Y'' = -Y (A'' Y + 2 A' Y')``."""
    (matrix,) = args or (kwargs["A"],)
    inverse = func(matrix.value)
    first = -(inverse @ matrix.first @ inverse)
    bend = 2 * ctx.summed(matrix.first @ first)
    if matrix.second is not None:
        bend = bend + matrix.second @ inverse
    return ctx.jet(inverse, first, -(inverse @ bend))


def solve(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Of ``A X = B``: ``X' = A⁻¹ (B' - A' X)``, ``X'' = A⁻¹ (B'' - A'' X - 2 A' X')``."""
    if kwargs or len(args) != 2:
        raise NotImplementedError("it has further arguments")
    matrix, right = args
    a, b = ctx.value(matrix), ctx.value(right)
    value = func(a, b)
    is_vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    x = value.unsqueeze(-1) if is_vector else value
    inverse = torch.linalg.inv(a)

    def columns(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(-1) if is_vector else tensor

    first: Any = columns(right.first) if ctx.owns(right) else 0
    second: Any = 0
    if ctx.owns(right) and right.second is not None:
        second = columns(right.second)
    if ctx.owns(matrix):
        first = inverse @ (first - matrix.first @ x)
        second = second - 2 * ctx.summed(matrix.first @ first)
        if matrix.second is not None:
            second = second - matrix.second @ x
    else:
        first = inverse @ first
    bend = inverse @ second if isinstance(second, Tensor) else None
    if is_vector:
        first, bend = first.squeeze(-1), bend if bend is None else bend.squeeze(-1)
    return ctx.jet(value, first, bend)
