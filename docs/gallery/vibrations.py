"""Vibrations of a cluster of 24 atoms, from its Hessian, a few rows at a time.

Argon atoms attract each other by the potential of Lennard and Jones. At a minimum of the energy the
eigenvalues of the Hessian are squared frequencies: of 72 modes six are zero, for the cluster may be
shifted and turned, and 66 are vibrations. Rows of four atoms are swept at once, and no others are
computed: of a large molecule, those of the atoms that matter.

The second derivative of a pair potential v is known in closed form, which stands beside the rows:

    ∂²v / ∂r ∂rᵀ = v'' r̂ r̂ᵀ + v'/r (1 - r̂ r̂ᵀ)

Source: Wales, Doye, "Global optimization by basin-hopping and the lowest energy structures of
Lennard-Jones clusters containing up to 110 atoms" (1997), for the energy of the minimum.

Run: ``python docs/gallery/vibrations.py``

Comes out: the published energy, six zero modes, and the frequencies of the closed form.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

import jacfunc

ATOMS, AT_ONCE = 24, 4
TENTHS = """
  -15 6 -3   -15 -6 -3  -14 0 7   -9 0 -11  -7 9 5     -7 -9 5
  -6 0 -1    -4 9 -6    -4 -9 -6  -3 0 10   1 0 -8     2 -16 1
  2 16 1     2 -5 1     2 5 1     3 -10 11  3 10 11    7 -9 -7
  7 9 -7     8 0 9      11 0 -13  11 0 -2   12 -10 4   12 10 4
"""
"""Where the atoms are, about, in tenths of the length σ of the potential."""
FIRST, SECOND = torch.triu_indices(ATOMS, ATOMS, 1)
"""Pairs of atoms."""

WELL, LENGTH, MASS = 119.8 * 1.380649e-23, 3.405e-10, 39.948 * 1.66053907e-27
"""Of argon, in J, m and kg."""
WAVENUMBER = (WELL / MASS) ** 0.5 / LENGTH / (2 * pi * 2.99792458e10)
"""A frequency of 1, in units of the potential, in 1/cm."""


def energy(x: Tensor) -> Tensor:
    """``Σ 4 (r⁻¹² - r⁻⁶)`` over pairs of atoms at ``[24, 3]``."""
    inverse = (x[FIRST] - x[SECOND]).square().sum(1) ** -3
    return 4 * (inverse.square() - inverse).sum()


def at_rest() -> Tensor:
    """The nearest minimum, ``[24, 3]``: by L-BFGS, and two steps of Newton's method to the end."""
    x = torch.tensor([float(number) for number in TENTHS.split()]).double().view(ATOMS, 3) / 10
    x.requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        (value := energy(x)).backward()
        return value

    optimizer.step(closure)
    x = x.detach()
    for _ in range(2):
        H = jacfunc.hessian(energy)(x).view(3 * ATOMS, -1)
        inverse = torch.linalg.pinv(H, rtol=1e-6, hermitian=True)  # not along the zero modes
        x = x - (inverse @ jacfunc.jacrev(energy)(x).flatten()).view_as(x)
    return x


def in_closed_form(x: Tensor) -> Tensor:
    """The Hessian ``[72, 72]`` by the formula for pairs."""
    apart = x[:, None] - x + torch.eye(ATOMS).to(x).unsqueeze(2)  # an atom has no pair with itself
    r = apart.norm(dim=2)[..., None, None]
    along = apart.unsqueeze(3) * apart.unsqueeze(2) / r**2
    bend, slope = 4 * (156 / r**14 - 42 / r**8), 4 * (6 / r**7 - 12 / r**13)
    pairs = bend * along + slope / r * (torch.eye(3).to(x) - along)
    pairs[range(ATOMS), range(ATOMS)] = 0
    blocks = -pairs
    blocks[range(ATOMS), range(ATOMS)] = pairs.sum(1)
    return blocks.transpose(1, 2).reshape(3 * ATOMS, 3 * ATOMS)


def main() -> dict[str, float]:
    """Print and return energy, zero modes, frequencies, and how far these are from a reference."""
    x = at_rest()
    rows = [
        jacfunc.hessian(energy, rows=range(first, first + AT_ONCE))(x)
        for first in range(0, ATOMS, AT_ONCE)
    ]
    H = torch.cat(rows).view(3 * ATOMS, 3 * ATOMS)
    squared, reference = (torch.linalg.eigvalsh(each) for each in (H, in_closed_form(x)))
    frequencies = WAVENUMBER * squared[6:].sqrt()
    results = {
        "energy": float(energy(x)),
        "zero modes": int((squared.abs() < 1e-9 * squared.max()).sum()),
        "lowest": float(frequencies.min()),
        "highest": float(frequencies.max()),
        "mean": float(frequencies.mean()),
        "asymmetry": float((H - H.T).abs().max() / H.abs().max()),
        "error": float((squared - reference).abs().max() / squared.max()),
    }
    print(f"energy {results['energy']:.6f}, of {3 * ATOMS} modes {results['zero modes']} are zero")
    print("vibration  1/cm")
    for name in ("lowest", "mean", "highest"):
        print(f"{name:9}  {results[name]:.2f}")
    return results


if __name__ == "__main__":
    main()
