"""Linear operators of matrices that are written down, which count their products."""

from __future__ import annotations

import torch
from torch import Tensor

from jacfunc.operators import LinearOperator, Space


class Dense(LinearOperator):
    """The operator of a matrix: ``pushed`` and ``pulled`` count the vectors it was given."""

    def __init__(self, entries: Tensor) -> None:
        rows, columns = entries.shape
        super().__init__(
            "Dense", Space.of(entries.new_zeros(columns)), Space.of(entries.new_zeros(rows))
        )
        self.entries = entries
        self.pushed = self.pulled = 0

    def pushforward_batch(self, tangents):
        self.pushed += len(tangents[0])
        return (tangents[0] @ self.entries.T,)

    def pullback_batch(self, cotangents):
        self.pulled += len(cotangents[0])
        return (cotangents[0] @ self.entries,)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def of_rank(rank: int, size: int) -> Tensor:
    """A square matrix of a rank that is not symmetric."""
    return normal(size, rank, seed=1) @ normal(rank, size, seed=2)


def definite(size: int, condition: float = 10.0) -> Tensor:
    """A symmetric matrix with eigenvalues from one to the condition number."""
    Q, _ = torch.linalg.qr(normal(size, size, seed=3))
    return (Q * torch.linspace(1, condition, size, dtype=torch.float64)) @ Q.T


def decaying(size: int) -> Tensor:
    """A symmetric matrix whose eigenvalues fall by a fifth each."""
    Q, _ = torch.linalg.qr(normal(size, size, seed=4))
    return (Q * 0.8 ** torch.arange(size, dtype=torch.float64)) @ Q.T
