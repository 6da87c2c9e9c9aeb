"""A neural wave function at samples of atoms, and a step of stochastic reconfiguration (minSR)."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.problems.judge import check, rows
from jacfunc._measuring import Check

COORDINATES, WIDTHS, STEP = 256, (512, 320), "step"
MOVED, DAMPING = 0.1, 0.01
PARAMETERS = 256 * 512 + 512 + 512 * 320 + 320 + 320 + 1
TOLERANCE = 1e-3
"""Largest error of a step beside its largest entry: float32 rounds J, which is solved with."""


@dataclass(frozen=True)
class Sampled:
    """The logarithm of a wave function, as a network, at samples, and their centred energies."""

    model: nn.Module
    positions: Tensor  # [N, coordinates]
    energies: Tensor  # [N]
    damping: float


def setup(samples: int, device: torch.device) -> Sampled:
    """Atoms near their equilibrium: samples differ little, so J has a large mean.

    ``‖J Jᵀ‖`` is a thousand times ``‖Jc Jcᵀ‖`` of the centred J.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = WIDTHS
        model = nn.Sequential(
            *(nn.Linear(COORDINATES, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh()),
            nn.Linear(second, 1),
        )
        positions = torch.randn(COORDINATES) + MOVED * torch.randn(samples, COORDINATES)
        energies = torch.randn(samples)
    energies -= energies.mean()
    return Sampled(model.to(device), positions.to(device), energies.to(device), DAMPING)


def judging(problem: Sampled) -> Check:
    """The step in float64, with rows of J that are taken one by one."""
    model = copy.deepcopy(problem.model).to("cpu", torch.float64)
    positions, energies = (
        x.to("cpu", torch.float64) for x in (problem.positions, problem.energies)
    )
    params = list(model.parameters())
    matrix = torch.stack(
        [torch.cat([b.flatten() for b in rows(model(x[None])[0, 0], params)]) for x in positions]
    )
    matrix -= matrix.mean(0)
    kernel = matrix @ matrix.T
    kernel.diagonal().add_(problem.damping)
    step = matrix.T @ torch.linalg.solve(kernel, energies)
    return partial(check, expected={STEP: step}, tolerance=TOLERANCE)
