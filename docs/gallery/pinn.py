"""A partial differential equation solved by a network, trained by Gauss-Newton steps and by Adam.

The network has the Poisson equation ``-Δu = f`` on the unit square, with u = 0 on its border and
f such that ``u = sin πx sin πy``. What is made small are residuals r at random points, with the
network's Laplacian in them. A step of Levenberg and Marquardt takes their Jacobian J in the
parameters as an operator, whose damping grows until the loss falls:

    θ ← θ - (Jᵀ J + λ)⁻¹ Jᵀ r

Adam starts from the same weights and goes down the gradient of the same loss. Its 500 steps take
about as long as the twenty of Gauss-Newton, each of which tries two or three dampings.

Source: Levenberg (1944), Marquardt (1963); Raissi, Perdikaris, Karniadakis, "Physics-informed
neural networks" (Journal of Computational Physics 378, 2019); Müller, Zeinhofer, "Achieving high
accuracy with PINNs via energy natural gradient descent" (ICML 2023).

Run: ``python docs/gallery/pinn.py``

Comes out: a relative error below one in a million after some twenty steps, and one in a hundred by
Adam.
"""

from __future__ import annotations

from math import log10, pi

import torch
from torch import Tensor, nn

import jacfunc

WIDTH, POINTS = 32, 300
ACCURATE, MOST_STEPS = 5e-7, 60
ADAMS_STEPS, ADAMS_RATE = 500, 1e-2

Params = dict[str, Tensor]


def solution(x: Tensor) -> Tensor:
    """What the network is to find, ``[B, 2]`` to ``[B]``."""
    return (pi * x).sin().prod(-1)


class Problem:
    """The equation at random points, for a network of one hidden layer."""

    def __init__(self) -> None:
        self.points, self.elsewhere = torch.rand(POINTS, 2).double(), torch.rand(2000, 2).double()
        self.right_side = 2 * pi**2 * solution(self.points)
        layers = nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
        self.network = nn.Sequential(*layers).double()
        with torch.no_grad():  # tanh is nearly a plane across the square otherwise
            layers[0].weight.mul_(2)
            layers[0].bias.mul_(2)
        self.start = {name: param.detach() for name, param in self.network.named_parameters()}

    def u(self, params: Params, x: Tensor) -> Tensor:
        """The network at points ``[..., 2]``, zero on the border."""
        values = torch.func.functional_call(self.network, params, x).squeeze(-1)
        return values * (x * (1 - x)).prod(-1)

    def residuals(self, params: Params) -> Tensor:
        """``Δu + f`` at the points, so that the sum of squares is their mean."""
        laplacian = jacfunc.laplacian(lambda x: self.u(params, x))
        return (jacfunc.vmap(laplacian)(self.points) + self.right_side) / POINTS**0.5

    def error(self, params: Params) -> float:
        """Of u beside the solution, at other points, relative, in the mean of squares."""
        true = solution(self.elsewhere)
        return float((self.u(params, self.elsewhere) - true).norm() / true.norm())


def by_gauss_newton(problem: Problem) -> list[float]:
    """Errors after each step, until one is small enough."""
    params, damping, errors = problem.start, 1e-2, [problem.error(problem.start)]
    while errors[-1] > ACCURATE and len(errors) <= MOST_STEPS:
        residuals, J = jacfunc.linearize(problem.residuals, params)
        while True:
            step = J.lstsq(residuals, damping=damping)
            candidate = {name: params[name] - step[name] for name in params}
            if problem.residuals(candidate).norm() < residuals.norm():
                break
            damping *= 4
        params, damping = candidate, damping / 10
        errors.append(problem.error(params))
    return errors


def by_adam(problem: Problem) -> list[float]:
    """Errors after each step."""
    params = {name: param.clone().requires_grad_() for name, param in problem.start.items()}
    optimizer = torch.optim.Adam(params.values(), lr=ADAMS_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAMS_STEPS)
    errors = []
    for _ in range(ADAMS_STEPS):
        optimizer.zero_grad()
        problem.residuals(params).square().sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            errors.append(problem.error(params))
    return errors


def main() -> dict[str, list[float]]:
    """Print and return the errors of both."""
    torch.manual_seed(1)
    problem = Problem()
    results = {"Gauss-Newton": by_gauss_newton(problem), "Adam": by_adam(problem)}
    print("by            log10 of the relative error")
    for name, errors in results.items():
        print(f"{name:12}  {log10(errors[-1]):27.1f}")
    return results


if __name__ == "__main__":
    main()
