"""Gauss-Newton and Fisher matrices, gradient norms and projections, without writing out J."""

from jacfunc._curvature.gauss_newton import GaussNewton
from jacfunc._curvature.ggn import fisher, ggn
from jacfunc._curvature.gradients import gradient_norms
from jacfunc._curvature.known_losses import check_loss
from jacfunc._curvature.loss import LossFunction
from jacfunc._curvature.products import by_samples
from jacfunc._curvature.projection import random_projection
