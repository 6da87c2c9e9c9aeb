"""Losses that many tests share."""

from __future__ import annotations

from torch import Tensor


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, whose second derivative is the identity."""
    return 0.5 * (outputs - targets).square().sum()
