"""Value, first and second derivatives carried forward through a function's operations, by rules."""

from jacfunc._forward_laplacian.jet import Jet
from jacfunc._forward_laplacian.second import SecondDerivatives, SecondOrder
