"""One number of a linear operator, or its diagonal: exactly, or by an estimator."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from jacfunc._types import Tree
from jacfunc.estimators import (
    Approximation,
    DiagonalEstimator,
    LogdetEstimator,
    SpectralNormEstimator,
    TraceEstimator,
)
from jacfunc.operators._linear_operator import LinearOperator
from jacfunc.operators._products import SumOfSquares, by_products, seen_by_estimators

TRACE = "Hutchinson, HutchPlusPlus or XTrace"
DIAGONAL = "Hutchinson or XDiag"
SPECTRAL_NORM = "Lanczos"
LOGDET = "StochasticLanczos"


@overload
def trace(operator: LinearOperator, estimator: None = None) -> Tensor: ...
@overload
def trace(operator: LinearOperator, estimator: TraceEstimator) -> Approximation: ...
def trace(operator: LinearOperator, estimator: TraceEstimator | None = None) -> Any:
    """The trace of a square operator: the sum of its diagonal, or an estimate of it.

    Args:
        operator: as :func:`jacfunc.linearize` makes it.
        estimator: None for the exact trace, or a :class:`Hutchinson`, :class:`HutchPlusPlus` or
            :class:`XTrace`.

    Returns:
        A number, or with an estimator an :class:`Approximation` of it, at least in float32. Both
        can be differentiated where products of the operator can.

    Raises:
        TypeError, ValueError: an operator that is not square, or empty; an estimator of another
            number.

    Cost:
        N products and memory of one chunk of them, or what the estimator says.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import XTrace
        >>> from jacfunc.operators import trace
        >>> value, J = jacfunc.linearize(lambda x: x**2 / 2, torch.arange(100.0))
        >>> trace(J)
        tensor(4950.)
        >>> estimate = trace(J, XTrace(40, seed=1))
        >>> bool((estimate.value - 4950).abs() < 3 * estimate.standard_error)
        True
    """
    matrix = by_products("trace", operator, estimator, "estimate_trace", TRACE)
    return matrix.diagonal().sum() if estimator is None else estimator.estimate_trace(matrix)


@overload
def diagonal(operator: LinearOperator, estimator: None = None) -> Tree: ...
@overload
def diagonal(operator: LinearOperator, estimator: DiagonalEstimator) -> Approximation: ...
def diagonal(operator: LinearOperator, estimator: DiagonalEstimator | None = None) -> Any:
    """The diagonal of a square operator, as a tree like its domain.

    Args:
        operator: as :func:`jacfunc.linearize` makes it.
        estimator: None for the exact diagonal, or a :class:`Hutchinson` or :class:`XDiag`.

    Returns:
        A tree, or with an estimator an :class:`Approximation` of two such trees.
        ``operator.domain.flat`` puts its numbers in a row.

    Raises:
        TypeError, ValueError: an operator that is not square, or empty; an estimator of another
            number.

    Cost:
        N products and memory of one chunk of them, or what the estimator says. An operator that
        knows its diagonal otherwise, as Gauss-Newton matrices do, gives that.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import Hutchinson
        >>> from jacfunc.operators import diagonal
        >>> value, J = jacfunc.linearize(lambda x: {"y": x["y"] ** 2}, {"y": torch.arange(4.0)})
        >>> diagonal(J)
        {'y': tensor([0., 2., 4., 6.])}
        >>> diagonal(J, Hutchinson(2)).value
        {'y': tensor([0., 2., 4., 6.])}
    """
    matrix = by_products("diagonal", operator, estimator, "estimate_diagonal", DIAGONAL)
    if estimator is None:
        return operator.diagonal()
    estimate, place = estimator.estimate_diagonal(matrix), operator.domain.tree
    return Approximation(place(estimate.value), place(estimate.standard_error))


@overload
def frobenius_norm(operator: LinearOperator, estimator: None = None) -> Tensor: ...
@overload
def frobenius_norm(operator: LinearOperator, estimator: TraceEstimator) -> Approximation: ...
def frobenius_norm(operator: LinearOperator, estimator: TraceEstimator | None = None) -> Any:
    """The root of the sum of all squared entries: ``‖A‖_F``, where ``‖A‖_F² = tr(Aᵀ A)``.

    Args:
        operator: as :func:`jacfunc.linearize` makes it.
        estimator: None for the exact norm, or one of the trace of ``Aᵀ A``, or of ``A Aᵀ`` where
            that is smaller. The squared norm is estimated without bias, its root with a small one.

    Returns:
        A number, or with an estimator an :class:`Approximation` of it, at least in float32.

    Raises:
        TypeError, ValueError: an operator that is empty; an estimator of another number.

    Cost:
        ``min(M, N)`` products and memory of one chunk of them, or twice what the estimator says.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.operators import frobenius_norm
        >>> value, J = jacfunc.linearize(lambda x: 3 * x, torch.ones(4))
        >>> frobenius_norm(J)
        tensor(6.)
    """
    by_products("frobenius_norm", operator, estimator, "estimate_trace", TRACE, is_square=False)
    if estimator is None:
        ((squares,),) = operator.into(SumOfSquares())
        return squares.sqrt()
    rows, columns = operator.shape
    gram = operator @ operator.T if rows < columns else operator.T @ operator
    squared = estimator.estimate_trace(seen_by_estimators("frobenius_norm", gram))
    norm = squared.value.clamp(min=0).sqrt()
    error = squared.standard_error / (2 * norm.detach())
    return Approximation(norm, torch.where(squared.standard_error > 0, error, 0.0))


@overload
def spectral_norm(operator: LinearOperator, estimator: None = None) -> Tensor: ...
@overload
def spectral_norm(operator: LinearOperator, estimator: SpectralNormEstimator) -> Approximation: ...
def spectral_norm(operator: LinearOperator, estimator: SpectralNormEstimator | None = None) -> Any:
    """The largest singular value, ``max ‖A v‖ / ‖v‖``.

    Args:
        operator: as :func:`jacfunc.linearize` makes it.
        estimator: None for that of the matrix, or a :class:`Lanczos`.

    Returns:
        A number, or with an estimator an :class:`Approximation` of it, at least in float32.

    Raises:
        TypeError, ValueError: an operator that is empty; an estimator of another number.

    Cost:
        The matrix, and its singular values; or what the estimator says.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.operators import spectral_norm
        >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, -3.0, 2.0]))
        >>> spectral_norm(J)
        tensor(6.)
    """
    args = "spectral_norm", operator, estimator, "estimate_spectral_norm", SPECTRAL_NORM
    matrix = by_products(*args, is_square=False)
    if estimator is not None:
        return estimator.estimate_spectral_norm(matrix)
    return torch.linalg.matrix_norm(operator.matrix().to(matrix.dtype), 2)


@overload
def logdet(operator: LinearOperator, estimator: None = None, *, damping: float = 0.0) -> Tensor: ...
@overload
def logdet(
    operator: LinearOperator, estimator: LogdetEstimator, *, damping: float = 0.0
) -> Approximation: ...
def logdet(
    operator: LinearOperator, estimator: LogdetEstimator | None = None, *, damping: float = 0.0
) -> Any:
    """The logarithm of the absolute value of the determinant, ``log |det (A + damping)|``.

    Args:
        operator: as :func:`jacfunc.linearize` makes it.
        estimator: None for that of the matrix, or a :class:`StochasticLanczos`, for operators that
            are symmetric and positive definite. For a J that is not, half the log-determinant of
            ``J.T @ J`` is that of J.
        damping: a number that is added to the diagonal.

    Returns:
        A number, or with an estimator an :class:`Approximation` of it, at least in float32; minus
        infinity of a singular matrix.

    Raises:
        TypeError, ValueError: an operator that is not square, or empty; an estimator of another
            number, or that meets an operator which is not positive definite; a negative damping.

    Cost:
        The matrix, and its factors; or what the estimator says.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.operators import logdet
        >>> value, J = jacfunc.linearize(torch.exp, torch.tensor([1.0, -3.0, 2.5]))
        >>> logdet(J)
        tensor(0.5000)
    """
    matrix = by_products("logdet", operator, estimator, "estimate_logdet", LOGDET)
    is_number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not is_number or not 0 <= damping < float("inf"):
        raise ValueError(
            f"logdet: damping must be a number that is not negative, got {damping!r}. It is added "
            "to the diagonal; A + B adds an operator."
        )
    if estimator is not None:
        return estimator.estimate_logdet(matrix, float(damping))
    dense = operator.matrix().to(matrix.dtype)
    if damping:
        dense = dense + torch.diag(dense.new_full((len(dense),), damping))
    return torch.linalg.slogdet(dense).logabsdet
