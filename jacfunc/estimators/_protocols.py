"""What an estimator must do, for each number that is estimated."""

from __future__ import annotations

from typing import Protocol

from jacfunc.estimators._approximation import Approximation, ByProducts


class TraceEstimator(Protocol):
    """Estimates a trace: ``Hutchinson``, ``HutchPlusPlus``, ``XTrace``, or an object of yours.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import Approximation
        >>> from jacfunc.operators import trace
        >>> class ByUnits:
        ...     def estimate_trace(self, matrix):
        ...         value = matrix.push(torch.eye(matrix.shape[1])).trace()
        ...         return Approximation(value, torch.zeros(()))
        >>> value, J = jacfunc.linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> trace(J, ByUnits()).value
        tensor(6.)
    """

    def estimate_trace(self, matrix: ByProducts) -> Approximation:
        """The trace of a square matrix, a tensor ``[]``, and its standard error."""
        ...


class DiagonalEstimator(Protocol):
    """Estimates a diagonal ``[N]``: ``Hutchinson``, ``XDiag``."""

    def estimate_diagonal(self, matrix: ByProducts) -> Approximation:
        """The diagonal ``[N]`` of a square matrix, and the standard error of each number."""
        ...


class SpectralNormEstimator(Protocol):
    """Estimates the largest singular value: ``Lanczos``."""

    def estimate_spectral_norm(self, matrix: ByProducts) -> Approximation:
        """The largest singular value, a tensor ``[]``, and how far it may be off."""
        ...


class LogdetEstimator(Protocol):
    """Estimates the log-determinant of a matrix and a damping: ``StochasticLanczos``."""

    def estimate_logdet(self, matrix: ByProducts, damping: float) -> Approximation:
        """``log det (A + damping)``, a tensor ``[]``, of a symmetric matrix; and its error."""
        ...
