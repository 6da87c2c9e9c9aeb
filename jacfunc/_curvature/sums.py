"""Sums over the samples of a batch, of what the columns of ``Jᵀ S`` are as parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from jacfunc._curvature.loss import OutputCurvature
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._modules import ModuleAtBatch
from jacfunc._types import Leaves

NamedParts: TypeAlias = dict[str, list[Part]]
Add: TypeAlias = Callable[[torch.Size, NamedParts], None]
"""Adds the columns of some samples to a sum: how many samples and columns, and parts by name."""


def added_up(point: ModuleAtBatch, curvature: OutputCurvature, add: Add, result: int) -> None:
    """Call ``add`` for some samples after the other, with a root S of their curvature.

    Args:
        result: bytes of the sum.
    """
    if not point.size:
        return
    roots = point.budget.keep(lambda: curvature.roots)

    def add_some(samples: slice, jacobian: FactoredJacobian) -> Leaves:
        cotangents = tuple(root[:, samples] for root in roots)
        num_roots, size = cotangents[0].shape[:2]
        parts = point.parts_of(jacobian, cotangents)
        with point.contracting():
            add(torch.Size((size, num_roots)), parts)
        return ()

    for _ in point.pieces(add_some, result):
        """What was returned is empty: all is in the sum."""
