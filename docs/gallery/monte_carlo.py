"""The ground state of coupled oscillators by variational Monte Carlo and natural gradients.

A network is the logarithm of a wave function ψ of six coordinates, which are sampled from ψ². The
mean of the local energy, in which ψ's Laplacian is, can't be below the energy of the ground state,

    E(x) = -½ (Δ log ψ + |∇ log ψ|²) + ½ xᵀ K x      E₀ = ½ tr √K

and is made smaller along the natural gradient, with O the Jacobian of ``log ψ`` in the parameters,
a row a sample, both O and E without their means over samples:

    θ ← θ - η Oᵀ (O Oᵀ + λ)⁻¹ (E - mean E)

There are fewer samples than parameters, so that the smaller side is that of samples.

Source: Chen, Heyl, "Empowering deep neural quantum states through efficient optimization" (Nature
Physics 2024), equation 6; Li et al., "A computational framework for neural network-based
variational Monte Carlo with forward Laplacian" (Nature Machine Intelligence 2024), algorithm 1.

Run: ``python docs/gallery/monte_carlo.py``

Comes out: the energy of the ground state to one part in a thousand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import jacfunc

COORDINATES, WALKERS = 6, 256
COUPLING = 1.0
ITERATIONS, RATE, DAMPING = 80, 0.1, 1e-3
MOVES, REACH = 10, 0.5
MEASURED = 40
"""Samples, of all walkers, of which the energy is the mean in the end."""


def stiffness() -> Tensor:
    """K: a ring of oscillators, each tied to its place and to its neighbours."""
    ring = torch.eye(COORDINATES).double()
    return ring + COUPLING * (2 * ring - ring.roll(1, 0) - ring.roll(-1, 0))


class LogPsi(nn.Module):
    """``log ψ`` of points ``[..., 6]``: a Gaussian to begin with, and a network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(COORDINATES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).squeeze(-1) - x.square().sum(-1) / 2


def metropolis(model: nn.Module, x: Tensor) -> Tensor:
    """The walkers ``[B, 6]`` after some moves of Metropolis, which leave ψ² as it is."""
    with torch.no_grad():
        before = model(x)
        for _ in range(MOVES):
            y = x + REACH * torch.randn_like(x)
            after = model(y)
            accepts = torch.rand_like(before).log() < 2 * (after - before)
            x, before = torch.where(accepts[:, None], y, x), torch.where(accepts, after, before)
    return x


def local_energies(model: nn.Module, x: Tensor, K: Tensor) -> Tensor:
    """The local energy of every walker, ``[B]``."""
    with torch.no_grad():
        _, slopes, laplacians = jacfunc.vmap(jacfunc.value_jacobian_laplacian(model))(x)
    return -(laplacians + slopes.square().sum(1)) / 2 + ((x @ K) * x).sum(1) / 2


def main() -> dict[str, float]:
    """Print and return energies at first and at last, and that of the ground state."""
    torch.manual_seed(0)
    K, model = stiffness(), LogPsi().double()
    operator = jacfunc.module_operator(model, per_sample=True)
    x = metropolis(model, torch.randn(WALKERS, COORDINATES).double())
    energies = []
    for _ in range(ITERATIONS):
        x = metropolis(model, x)
        local = local_energies(model, x, K)
        energies.append(float(local.mean()))
        step = operator(x).lstsq(local - local.mean(), damping=DAMPING, center=True)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param -= RATE * step[name]

    samples = []
    for _ in range(MEASURED):
        x = metropolis(model, x)
        samples.append(local_energies(model, x, K))
    results = {"first": energies[0]}
    spread, mean = torch.std_mean(torch.cat(samples))
    results["last"], results["spread"] = float(mean), float(spread)
    results["ground state"] = float(torch.linalg.eigvalsh(K).sqrt().sum()) / 2
    print(f"energy at first          {results['first']:.4f}")
    print(f"after {ITERATIONS} steps           {results['last']:.4f}")
    print(f"of the ground state      {results['ground state']:.4f}")
    print(f"spread of local energies {results['spread']:.4f}")
    return results


if __name__ == "__main__":
    main()
