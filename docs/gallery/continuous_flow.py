"""Densities of a continuous normalizing flow: the log-determinant as an integral of divergences.

A network is the velocity of a flow that carries data x to noise z = F(x), so that the data have the
density ``log p(x) = log N(F(x)) + log |det ∂F/∂x|``. Along a trajectory the last term grows by the
divergence of the velocity, which FFJORD estimates from one random vector v a trajectory:

    log |det ∂F/∂x| = ∫ div f(x(t), t) dt      div f ≈ vᵀ (∂f/∂x) v

It is taken here in three ways: from the Jacobian of the whole map, by integrating the exact
divergence beside the trajectory, and by integrating the estimate. The data are eight Gaussians on a
ring, whose density is known; the network is trained by flow matching, which needs no derivative.

Source: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD" (ICLR 2019), equations 2 and 8;
Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow matching for generative modeling" (ICLR 2023).

Run: ``python docs/gallery/continuous_flow.py``

Comes out: the integral of divergences is the determinant up to the error of the integration, which
falls by 16 when the steps are halved; the density that comes of it has the integral 1.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, pi

import torch
from torch import Tensor, nn

import jacfunc

POINTS, PROBES = 100, 32
STEPS, GRID = 20, 41
TRAINING_STEPS, BATCH = 600, 256
SPREAD = 0.3
"""Of each Gaussian; their means are on a ring of radius 2."""

Rates = Callable[..., tuple[Tensor, ...]]
"""From a time and the tensors of a state, how fast these change."""


def centres() -> Tensor:
    """Means of the Gaussians, ``[8, 2]``."""
    angles = 2 * pi * torch.arange(8, dtype=torch.float64) / 8
    return 2 * torch.stack([angles.cos(), angles.sin()], 1)


def data(count: int) -> Tensor:
    """Points of the ring, ``[count, 2]``."""
    return centres()[torch.randint(8, (count,))] + SPREAD * torch.randn(count, 2).double()


def log_normal(x: Tensor) -> Tensor:
    """Log-density of the standard normal distribution, ``[B, 2]`` to ``[B]``."""
    return -x.square().sum(-1) / 2 - log(2 * pi)


def log_ring(x: Tensor) -> Tensor:
    """Log-density of the data."""
    each = log_normal((x[:, None] - centres()) / SPREAD) - 2 * log(SPREAD)
    return each.logsumexp(1) - log(8)


class Velocity(nn.Module):
    """Of noise that becomes data while the time goes from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([x, time.expand(*x.shape[:-1], 1)], -1))


def train() -> nn.Module:
    """A velocity that carries noise along straight lines, in the mean."""
    model = Velocity().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        x, noise, time = data(BATCH), torch.randn(BATCH, 2).double(), torch.rand(BATCH, 1).double()
        optimizer.zero_grad()
        (model((1 - time) * noise + time * x, time) - (x - noise)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def integrate(steps: int, rates: Rates, *state: Tensor) -> tuple[Tensor, ...]:
    """The state at time 0 from that at time 1, by the method of Runge and Kutta."""
    step = -1 / steps

    def along(slopes: tuple[Tensor, ...], by: float) -> tuple[Tensor, ...]:
        return tuple([x.add(slope, alpha=by) for x, slope in zip(state, slopes, strict=True)])

    for time in torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]:
        k1 = rates(time, *state)
        k2 = rates(time + step / 2, *along(k1, step / 2))
        k3 = rates(time + step / 2, *along(k2, step / 2))
        k4 = rates(time + step, *along(k3, step))
        for slopes, weight in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
            state = along(slopes, weight * step / 6)
    return state


def by_jacobian(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """``log |det ∂F/∂x|`` of every point, ``[B]``, from the Jacobian of the whole map."""

    def flow(x: Tensor) -> Tensor:
        return integrate(steps, lambda time, x: (model(x, time),), x)[0]

    return torch.linalg.slogdet(jacfunc.vmap(jacfunc.jacobian(flow))(x)).logabsdet


def by_divergence(model: nn.Module, x: Tensor, steps: int) -> tuple[Tensor, ...]:
    """``F(x)`` and ``log |det ∂F/∂x|``, the integral of the exact divergence."""

    def rates(time: Tensor, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor) -> tuple[Tensor, Tensor]:
            return (value := model(x, time)), value

        divergence, value = jacfunc.vmap(jacfunc.divergence(velocity, has_aux=True))(x)
        return value, divergence

    return integrate(steps, rates, x, x.new_zeros(len(x)))


def by_estimate(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """``log |det ∂F/∂x|``, the integral of an estimate by one vector of signs for every point."""
    signs = 2 * torch.randint(2, x.shape).to(x) - 1

    def rates(time: Tensor, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        value, product = jacfunc.jvp(lambda x: model(x, time), (x,), (signs,))
        return value, (signs * product).sum(1)

    return integrate(steps, rates, x, x.new_zeros(len(x)))[1]


def main() -> dict[str, float]:
    """Print and return how far the three ways are apart, and what the density comes to."""
    torch.manual_seed(0)
    model, points = train(), data(POINTS)
    results = {}
    print("steps  largest difference of the integral, log10")
    for steps in (10, 20, 40):
        exact = by_jacobian(model, points, steps)
        _, integral = by_divergence(model, points, steps)
        results[str(steps)] = float((integral - exact).abs().max().log10())
        print(f"{steps:5}  {results[str(steps)]:43.1f}")

    repeated = points.repeat_interleave(PROBES, 0)
    errors = by_estimate(model, repeated, STEPS).view(POINTS, PROBES) - integral[:, None]
    results["one vector"] = float(errors.square().mean().sqrt())
    results["all vectors"] = float(errors.mean(1).square().mean().sqrt())
    results["standard error"] = float((errors.var(1).mean() / PROBES).sqrt())
    print("estimate                 error")
    print(f"one vector a point       {results['one vector']:.3f}")
    print(f"{PROBES} vectors a point      {results['all vectors']:.3f}")
    print(f"standard error of these  {results['standard error']:.3f}")

    side = torch.linspace(-5, 5, GRID, dtype=torch.float64)
    z, integral = by_divergence(model, torch.cartesian_prod(side, side), STEPS)
    results["plane"] = float((log_normal(z) + integral).exp().sum() * (side[1] - side[0]) ** 2)
    z, integral = by_divergence(model, points, STEPS)
    results["flow"] = float((log_normal(z) + integral).mean())
    results["data"] = float(log_ring(points).mean())
    print("density")
    print(f"integral over the plane  {results['plane']:.3f}")
    print(f"mean log of new points   {results['flow']:.3f}")
    print(f"mean log, their own      {results['data']:.3f}")
    return results


if __name__ == "__main__":
    main()
