"""Systems of equations ``(A + λ) x = b`` with a symmetric A, and who solves them."""

from jacfunc._solving.halves import SOME_BYTES, Half, Rows
from jacfunc._solving.solvers import (
    PRECISE,
    Cholesky,
    ConjugateGradient,
    Solver,
    check_options,
)

__all__ = [
    "PRECISE",
    "SOME_BYTES",
    "Cholesky",
    "ConjugateGradient",
    "Half",
    "Rows",
    "Solver",
    "check_options",
]
