"""Linear operators on trees: products with Jacobians and their like, without the matrix.

:func:`jacfunc.linearize` and others make a :class:`LinearOperator`, which has products, an algebra
and solves. ``trace(A)`` and others reduce it, exactly or by :mod:`jacfunc.estimators`.
"""

from jacfunc._solving import Cholesky, ConjugateGradient, Solver
from jacfunc.operators._hessian import HessianOperator, hessian_operator
from jacfunc.operators._laplacian import (
    divergence,
    hessian_diagonal,
    laplacian,
    value_jacobian_laplacian,
)
from jacfunc.operators._linear_operator import LinearOperator, SymmetricOperator
from jacfunc.operators._linearize import Linearized, linearize
from jacfunc.operators._reductions import diagonal, frobenius_norm, logdet, spectral_norm, trace
from jacfunc.operators._space import Space

__all__ = [
    "Cholesky",
    "ConjugateGradient",
    "HessianOperator",
    "LinearOperator",
    "Linearized",
    "Solver",
    "Space",
    "SymmetricOperator",
    "diagonal",
    "divergence",
    "frobenius_norm",
    "hessian_diagonal",
    "hessian_operator",
    "laplacian",
    "linearize",
    "logdet",
    "spectral_norm",
    "trace",
    "value_jacobian_laplacian",
]
