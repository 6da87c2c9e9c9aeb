"""Lyapunov exponents of the Lorenz system: how fast nearby trajectories part.

The flow over a short time is linearized, a frame Q of three tangents goes through it, and QR makes
the frame orthonormal again. What R has on its diagonal are the factors by which the tangents grew:

    Z = J Q      Z = Q' R      λ_i = mean of log R_ii / time

Many trajectories go side by side; they do not depend on each other, so one product carries the
frames of all. Nothing is pulled back, and no graph is kept.

Source: Benettin, Galgani, Giorgilli, Strelcyn, "Lyapunov characteristic exponents for smooth
dynamical systems" (Meccanica 15, 1980); for the values Sprott, "Chaos and time-series analysis"
(2003).

Run: ``python docs/gallery/lyapunov.py``

Comes out: the published exponents, 0.906, 0 and -14.572, to 0.02 and nearer, and their sum, which
is the trace of the equation's own Jacobian, -41/3.
"""

from __future__ import annotations

import torch
from torch import Tensor

import jacfunc

SIGMA, RHO, BETA = 10.0, 28.0, 8 / 3
PUBLISHED = (0.9056, 0.0, -14.5723, -(SIGMA + 1 + BETA))
"""The three exponents; and their sum, the trace of the equation's own Jacobian."""
TRAJECTORIES = 1024
STEP, STEPS_A_FRAME = 0.02, 5
FORGOTTEN, FRAMES = 60, 200
"""Frames until the trajectories are on the attractor and the frames along it, and after that."""

LINEAR = torch.tensor([[-SIGMA, SIGMA, 0], [RHO, -1, 0], [0, 0, -BETA]], dtype=torch.float64)
TURN = torch.tensor([[0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)


def velocity(x: Tensor) -> Tensor:
    """The Lorenz system's right-hand side, ``[B, 3]`` to ``[B, 3]``."""
    return x @ LINEAR.T + x[:, :1] * (x @ TURN.T)


def flow(x: Tensor) -> Tensor:
    """Where the points ``[B, 3]`` are after five steps of Runge and Kutta."""
    for _ in range(STEPS_A_FRAME):
        k1 = velocity(x)
        k2 = velocity(x.add(k1, alpha=STEP / 2))  # quicker in forward mode than x + STEP / 2 * k1
        k3 = velocity(x.add(k2, alpha=STEP / 2))
        k4 = velocity(x.add(k3, alpha=STEP))
        x = x.add((k1 + k4).add(k2 + k3, alpha=2), alpha=STEP / 6)
    return x


def main() -> dict[str, float]:
    """Print and return the three exponents, and their sum."""
    torch.manual_seed(0)
    x = torch.randn(TRAJECTORIES, 3, dtype=torch.float64) + torch.tensor([0.0, 0.0, 25.0])
    frames = torch.linalg.qr(torch.randn(TRAJECTORIES, 3, 3, dtype=torch.float64)).Q
    growth = torch.zeros(3, dtype=torch.float64)
    for number in range(FORGOTTEN + FRAMES):
        x, J = jacfunc.linearize(flow, x)
        tangents = frames.movedim(-1, 0).contiguous()  # three of all trajectories, [3, B, 3]
        frames, R = torch.linalg.qr(J.mm(tangents).movedim(0, -1))
        if number >= FORGOTTEN:
            growth += R.diagonal(dim1=1, dim2=2).abs().log().mean(0)
    exponents = growth / (FRAMES * STEPS_A_FRAME * STEP)

    results = {"1": exponents[0], "2": exponents[1], "3": exponents[2], "sum": exponents.sum()}
    print("exponent  published  difference")
    for (name, exponent), published in zip(results.items(), PUBLISHED, strict=True):
        print(f"{name:8}  {published:9.3f}  {abs(float(exponent) - published):10.3f}")
    return {name: float(exponent) for name, exponent in results.items()}


if __name__ == "__main__":
    main()
