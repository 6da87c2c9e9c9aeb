"""Estimators that find most of the matrix in a few directions, and sample the rest alone.

Directions are found without a graph, and an estimate is linear in the matrix for directions that
are fixed: its derivative estimates the derivative of the trace without bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size
from jacfunc.estimators._approximation import (
    Approximation,
    ByProducts,
    Scatter,
    by_chunks,
    check_count,
    check_seed,
    random_rows,
)


@dataclass(frozen=True)
class _Sketching:
    """The options of an estimator that multiplies a sketch."""

    num_products: int = 100
    seed: int = 0
    chunk_size: int | None = 64
    _least: ClassVar = 4

    def __post_init__(self) -> None:
        api = type(self).__name__
        check_count(api, "num_products", self.num_products, self._least)
        check_seed(api, self.seed)
        check_chunk_size(api, self.chunk_size)


@dataclass(frozen=True)
class HutchPlusPlus(_Sketching):
    """The trace on the range of a sketch ``A S``, and Hutchinson's estimate of the rest.

    Q spans the range of ``A S``; the estimate is ``tr(Qᵀ A Q)`` and the mean of ``gᵀ A g`` for
    signs g from which their part in Q is taken out. A matrix of a rank up to a third of the
    products has the exact trace. Of a positive semidefinite matrix the error falls as one over the
    number of products.

    Meyer, Musco, Musco and Woodruff 2021, Algorithm 1.

    Args:
        num_products: products with A, of which a third each goes into S, Q and g.
        seed: of the vectors; the same seed gives the same ones, whatever the device or the chunks.
        chunk_size: vectors that are multiplied at once; None for all.

    Raises:
        TypeError, ValueError: options that mean nothing.

    Cost:
        ``num_products`` products and, of N numbers each, as many vectors; where N is no larger, the
        exact trace by N products.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import HutchPlusPlus
        >>> from jacfunc.operators import trace
        >>> u = torch.arange(1.0, 101.0, dtype=torch.float64)
        >>> value, J = jacfunc.linearize(lambda x: u * (u @ x), u)
        >>> trace(J, HutchPlusPlus(6)).value  # the rank is one
        tensor(338350., dtype=torch.float64)
    """

    num_products: int = 99
    _least: ClassVar = 6

    def estimate_trace(self, matrix: ByProducts) -> Approximation:
        """The trace in the directions of a sketch, and the mean over signs in the others."""
        if self.num_products >= matrix.shape[1]:
            return matrix.exact_trace()
        third = self.num_products // 3
        vectors = random_rows(matrix, 2 * third, self.seed, third, signs=True)
        sketch = by_chunks(matrix.push, next(vectors), self.chunk_size)
        Q, _ = _row_basis(sketch)
        inside = (Q * by_chunks(matrix.push, Q, self.chunk_size)).sum()
        rest = next(vectors)
        rest = rest - rest @ Q.T @ Q
        scatter = Scatter()
        scatter.add((rest * by_chunks(matrix.push, rest, self.chunk_size)).sum(1))
        outside = scatter.result()
        return Approximation(inside + outside.value, outside.standard_error)


@dataclass(frozen=True)
class XTrace(_Sketching):
    """The trace from a sketch ``A Ω``, in which each vector tests the basis of all others.

    For each vector ω of Ω the trace is estimated as that in the range of ``A`` times the others,
    and ``ωᵀ A ω`` in what is orthogonal to it; the estimate is the mean. It is unbiased, exact for
    matrices of a rank below half the products and for multiples of the identity, and for the same
    products no worse than :class:`HutchPlusPlus`, mostly by far better.

    Epperly, Tropp and Webber 2024, XTrace, with normal vectors, whose parts in the rest are scaled
    to the length that they have in the mean.

    Args:
        num_products: products with A, one half with Ω and one with a basis of ``A Ω``.
        seed: of the vectors; the same seed gives the same ones, whatever the device or the chunks.
        chunk_size: vectors that are multiplied at once; None for all.

    Raises:
        TypeError, ValueError: options that mean nothing.

    Cost:
        ``num_products`` products and, of N numbers each, twice as many vectors; where N is no
        larger, the exact trace by N products.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import XTrace
        >>> from jacfunc.operators import trace
        >>> spectrum = 0.5 ** torch.arange(200, dtype=torch.float64)
        >>> value, J = jacfunc.linearize(lambda x: spectrum * x, torch.ones_like(spectrum))
        >>> trace(J, XTrace(60)).value
        tensor(2.0000, dtype=torch.float64)
    """

    def estimate_trace(self, matrix: ByProducts) -> Approximation:
        """The mean of the estimates that leave one vector out of the basis."""
        size, half = matrix.shape[1], self.num_products // 2
        if self.num_products >= size:
            return matrix.exact_trace()
        (vectors,) = random_rows(matrix, half, self.seed, None, signs=False)
        products = by_chunks(matrix.push, vectors, self.chunk_size)
        Q, own = _row_basis(products)
        pushed = by_chunks(matrix.push, Q, self.chunk_size)
        inside = (Q * pushed).sum() - ((own @ Q) * (own @ pushed)).sum(1)
        within = vectors @ Q.T  # coordinates in the basis of the other vectors
        within = within - own * (within * own).sum(1, keepdim=True)
        rest = vectors - within @ Q
        length = (size - half + 1) / rest.square().sum(1)
        outside = length * (rest * (products - within @ pushed)).sum(1)
        scatter = Scatter()
        scatter.add(inside + outside)
        return scatter.result()


@dataclass(frozen=True)
class XDiag(_Sketching):
    """The diagonal from a sketch ``A Ω``, in which each sign vector tests the basis of all others.

    For each ω of Ω it is the diagonal of A in the range of ``A`` times the others, and
    ``ω ⊙ A ω`` of what is orthogonal to that; the estimate is the mean. It is unbiased, and exact
    for matrices of a rank below half the products.

    Epperly, Tropp and Webber 2024, XDiag.

    Args:
        num_products: one half with A, one half with Aᵀ.
        seed: of the vectors; the same seed gives the same ones, whatever the device or the chunks.
        chunk_size: vectors that are multiplied at once; None for all.

    Raises:
        TypeError, ValueError: options that mean nothing.

    Cost:
        ``num_products`` products and, of N numbers each, twice as many vectors; where N is no
        larger, the exact diagonal by N products.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import XDiag
        >>> from jacfunc.operators import diagonal
        >>> u = torch.arange(1.0, 101.0, dtype=torch.float64)
        >>> value, J = jacfunc.linearize(lambda x: u * (u @ x), u)
        >>> diagonal(J, XDiag(4)).value[:3]  # the rank is one
        tensor([1., 4., 9.], dtype=torch.float64)
    """

    def estimate_diagonal(self, matrix: ByProducts) -> Approximation:
        """The mean of the estimates that leave one vector out of the basis."""
        if self.num_products >= matrix.shape[1]:
            exact = matrix.diagonal()
            return Approximation(exact, torch.zeros_like(exact, requires_grad=False))
        half = self.num_products // 2
        (vectors,) = random_rows(matrix, half, self.seed, None, signs=True)
        products = by_chunks(matrix.push, vectors, self.chunk_size)
        Q, own = _row_basis(products)
        pulled = by_chunks(matrix.pull, Q, self.chunk_size)
        inside = (Q * pulled).sum(0) - (own @ Q) * (own @ pulled)
        within = products @ Q.T
        within = within - own * (within * own).sum(1, keepdim=True)
        scatter = Scatter()
        scatter.add(inside + vectors * (products - within @ Q))
        return scatter.result()


def _row_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of K rows ``[K, N]``, and what of it each row alone adds.

    Returns:
        Q ``[K, N]``, and unit vectors ``s_i`` in the rows of ``[K, K]``: the basis of all rows but
        the i-th spans ``Q`` without ``s_i Q``. Where rows depend on each other, ``s_i`` lies in
        what none of them needs.
    """
    columns, R = torch.linalg.qr(rows.detach().T)
    # s_i is orthogonal to all columns of R but the i-th: the i-th column of R⁻ᵀ, scaled
    U, sizes, V = torch.linalg.svd(R)
    least = sizes[:1] * torch.finfo(sizes.dtype).eps
    own = (V.T / torch.where(sizes > least, sizes, least + (least == 0))) @ U.T
    return columns.T, own / own.norm(dim=1, keepdim=True)
