"""Derivatives of the activations of networks; at a kink what torch takes there."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor

from jacfunc._forward_laplacian.elementwise import Derivatives, Formula
from jacfunc._forward_laplacian.propagation import times


def _silu(x: Tensor, y: Tensor) -> Derivatives:
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    return s + x * slope, slope * (2 + x * (1 - 2 * s))


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> Derivatives:
    if approximate == "none":
        density = torch.exp(-x * x / 2) / sqrt(2 * pi)
        return (1 + torch.erf(x / sqrt(2))) / 2 + x * density, density * (2 - x * x)
    scale, cubic = sqrt(2 / pi), 0.044715
    t = torch.tanh(scale * (x + cubic * x * x * x))
    inner, bend = scale * (1 + 3 * cubic * x * x), scale * 6 * cubic * x
    slope = 1 - t * t
    first = (1 + t + x * slope * inner) / 2
    return first, slope * inner + x * slope * (bend - 2 * t * inner * inner) / 2


def _softplus(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Derivatives:
    s = torch.sigmoid(beta * x)
    is_linear = beta * x > threshold
    return torch.where(is_linear, 1.0, s), torch.where(is_linear, 0.0, beta * s * (1 - s))


def _logsigmoid(x: Tensor, y: Tensor) -> Derivatives:
    s = torch.sigmoid(-x)
    return s, -s * (1 - s)


def _mish(x: Tensor, y: Tensor) -> Derivatives:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    slope = (1 - t * t) * s
    return t + x * slope, slope * (2 + x * ((1 - s) - 2 * t * s))


def _elu(x: Tensor, y: Tensor, alpha: float = 1.0) -> Derivatives:
    bent = alpha * torch.exp(torch.where(x > 0, 0.0, x))
    return torch.where(x > 0, 1.0, bent), torch.where(x > 0, 0.0, bent)


def _celu(x: Tensor, y: Tensor, alpha: float = 1.0) -> Derivatives:
    bent = torch.exp(torch.where(x > 0, 0.0, x) / alpha)
    return torch.where(x > 0, 1.0, bent), torch.where(x > 0, 0.0, bent / alpha)


def _selu(x: Tensor, y: Tensor) -> Derivatives:
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    slope, bend = _elu(x, y, alpha)
    return scale * slope, times(scale, bend)


def _relu(x: Tensor, y: Tensor) -> Derivatives:
    return (x > 0).to(x.dtype), None


def _leaky_relu(x: Tensor, y: Tensor, negative_slope: float = 0.01) -> Derivatives:
    return torch.where(x > 0, torch.full_like(x, 1), negative_slope), None


def _hardtanh(x: Tensor, y: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Derivatives:
    return ((x > min_val) & (x < max_val)).to(x.dtype), None


def _relu6(x: Tensor, y: Tensor) -> Derivatives:
    return _hardtanh(x, y, 0.0, 6.0)


def _softsign(x: Tensor, y: Tensor) -> Derivatives:
    slope = 1 / (1 + x.abs())
    return slope * slope, -2 * torch.sign(x) * slope**3


ACTIVATIONS: dict[str, Formula] = {
    "silu": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "mish": _mish,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "softsign": _softsign,
}
"""For activations, by name, their derivatives."""
