"""Systems of equations ``(A + λ) x = b`` with a symmetric A, and who solves them."""

from jacfunc._solving.choice import Side, check_gram, check_options, check_side, side_of
from jacfunc._solving.sides import SOME_BYTES, OneSide
from jacfunc._solving.solvers import PRECISE, Cholesky, ConjugateGradient, Solver

__all__ = [
    "PRECISE",
    "SOME_BYTES",
    "Cholesky",
    "ConjugateGradient",
    "OneSide",
    "Side",
    "Solver",
    "check_gram",
    "check_options",
    "check_side",
    "side_of",
]
