"""Linear operators on trees: products with Jacobians and their like, without the matrix.

:func:`jacfunc.linearize` and others make a :class:`LinearOperator`: ``A @ v``, ``A.T @ u``,
``A.matrix()``, ``A.solve(b)``, sums, scalings, compositions and restrictions of operators.
"""

from jacfunc._solving import Cholesky, ConjugateGradient, Solver
from jacfunc.operators._linear_operator import LinearOperator
from jacfunc.operators._linearize import Linearized, linearize
from jacfunc.operators._space import Space

__all__ = [
    "Cholesky",
    "ConjugateGradient",
    "LinearOperator",
    "Linearized",
    "Solver",
    "Space",
    "linearize",
]
