"""Gauss-Newton and Fisher matrices, gradient norms and projections, without writing out J."""

from jacfunc._curvature.gauss_newton import GaussNewton
from jacfunc._curvature.ggn import fisher, ggn
from jacfunc._curvature.gradients import gradient_norms
from jacfunc._curvature.loss import LossFunction
from jacfunc._curvature.projection import random_projection
from jacfunc._curvature.whole_batch import Recorded, by_samples, check_alone
