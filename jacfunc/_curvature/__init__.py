"""Curvature of a loss in a module's parameters, without the Jacobian."""

from jacfunc._curvature.gauss_newton import GaussNewton
from jacfunc._curvature.ggn import fisher, ggn, gradient_norms
from jacfunc._curvature.projection import random_projection
