"""Losses by formulas: second derivatives in the outputs, and targets drawn from likelihoods."""

from jacfunc._losses.drawn import DenseColumns, Drawn
from jacfunc._losses.formulas import SecondDerivative
from jacfunc._losses.likelihoods import Likelihood, Predictive, check_draws
from jacfunc._losses.torch_losses import LossKind, TorchLoss, check_loss, is_of_torch, known_formula
