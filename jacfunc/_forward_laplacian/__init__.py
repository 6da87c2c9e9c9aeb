"""Value, first and second derivatives carried forward through a function's operations, by rules."""

from jacfunc._forward_laplacian.jet import NoRule
from jacfunc._forward_laplacian.propagate import Derivatives, propagate
