"""A module as users write one, for ``python -m jacfunc compare``; copied to where that runs."""

import torch
from torch import nn

from jacfunc.compare._problem import Problem

WEIGHT = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 0.25]])


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(5, 3)


def make_function():
    return lambda x: torch.tanh(WEIGHT @ x), torch.ones(3)


def make_problem():
    model, inputs = make_model()
    return Problem(model, (inputs,), wrt="inputs")


def make_list():
    return [nn.Linear(3, 2), torch.ones(5, 3)]


def make_crash():
    raise RuntimeError("a fault of the user's")
