"""Estimates of traces, diagonals, norms and determinants of a matrix known by its products.

``trace(A, XTrace(100))`` and other functions of ``jacfunc.operators`` take these. An estimator of
your own is any object with the method of a protocol here.
"""

from jacfunc.estimators._approximation import Approximation, ByProducts
from jacfunc.estimators._hutchinson import Hutchinson
from jacfunc.estimators._lanczos import Lanczos
from jacfunc.estimators._low_rank import HutchPlusPlus, XDiag, XTrace
from jacfunc.estimators._protocols import (
    DiagonalEstimator,
    LogdetEstimator,
    SpectralNormEstimator,
    TraceEstimator,
)
from jacfunc.estimators._quadrature import StochasticLanczos

__all__ = [
    "Approximation",
    "ByProducts",
    "DiagonalEstimator",
    "HutchPlusPlus",
    "Hutchinson",
    "Lanczos",
    "LogdetEstimator",
    "SpectralNormEstimator",
    "StochasticLanczos",
    "TraceEstimator",
    "XDiag",
    "XTrace",
]
