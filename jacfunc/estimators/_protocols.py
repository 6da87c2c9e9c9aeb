"""What an estimator must do, for each number that is estimated."""

from __future__ import annotations

from typing import Protocol

from jacfunc.estimators._approximation import Approximation, ByProducts


class TraceEstimator(Protocol):
    """Estimates a trace: ``Hutchinson``, ``HutchPlusPlus``, ``XTrace``."""

    def estimate_trace(self, matrix: ByProducts) -> Approximation: ...


class DiagonalEstimator(Protocol):
    """Estimates a diagonal ``[N]``: ``Hutchinson``, ``XDiag``."""

    def estimate_diagonal(self, matrix: ByProducts) -> Approximation: ...


class SpectralNormEstimator(Protocol):
    """Estimates the largest singular value: ``Lanczos``."""

    def estimate_spectral_norm(self, matrix: ByProducts) -> Approximation: ...


class LogdetEstimator(Protocol):
    """Estimates the log-determinant of a matrix and a damping: ``StochasticLanczos``."""

    def estimate_logdet(self, matrix: ByProducts, damping: float) -> Approximation: ...
