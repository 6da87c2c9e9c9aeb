"""Hutchinson's estimators of the trace and of the diagonal: products with random vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from jacfunc._arguments import check_chunk_size
from jacfunc.estimators._approximation import (
    Approximation,
    ByProducts,
    Scatter,
    check_count,
    check_seed,
    random_rows,
)

API = "Hutchinson"


@dataclass(frozen=True)
class Hutchinson:
    """The trace as the mean of ``ωᵀ A ω``, the diagonal as that of ``ω ⊙ A ω``, for random ω.

    Both are unbiased. A symmetric A has the variance ``2 (‖A‖_F² - Σ aᵢᵢ²) / num_samples`` with
    signs, ``2 ‖A‖_F² / num_samples`` with normal numbers: the error falls with the root of the
    number of products. Of matrices whose singular values fall, :class:`XTrace` knows more.

    Girard 1989; Hutchinson 1990; of the diagonal Bekas, Kokiopoulou and Saad 2007.

    Args:
        num_samples: vectors ω, each of which takes one product.
        seed: of the vectors; the same seed gives the same ones, whatever the device or the chunks.
        distribution: ``"rademacher"`` draws signs, ``"normal"`` normal numbers, for traces alone.
        chunk_size: vectors that are multiplied at once; None for all.

    Raises:
        TypeError, ValueError: options that mean nothing.

    Cost:
        ``num_samples`` products, and memory of one chunk of vectors and products.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import Hutchinson
        >>> from jacfunc.operators import trace
        >>> A = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
        >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(2))
        >>> estimate = trace(J, Hutchinson(1000, seed=1))
        >>> bool((estimate.value - 5).abs() < 3 * estimate.standard_error)
        True
    """

    num_samples: int = 100
    seed: int = 0
    distribution: Literal["rademacher", "normal"] = "rademacher"
    chunk_size: int | None = 64

    def __post_init__(self) -> None:
        check_count(API, "num_samples", self.num_samples, 2)
        check_seed(API, self.seed)
        check_chunk_size(API, self.chunk_size)
        if not isinstance(self.distribution, str) or self.distribution not in (
            "rademacher",
            "normal",
        ):
            raise ValueError(
                f"{API}: distribution must be 'rademacher' or 'normal', got "
                f"{self.distribution!r}. Signs have the smaller variance."
            )

    def estimate_trace(self, matrix: ByProducts) -> Approximation:
        """The mean of ``ωᵀ A ω``."""
        scatter = Scatter()
        for vectors in self._vectors(matrix):
            scatter.add((vectors * matrix.push(vectors)).sum(1))
        return scatter.result()

    def estimate_diagonal(self, matrix: ByProducts) -> Approximation:
        """The mean of ``ω ⊙ A ω``, of signs ω."""
        if self.distribution != "rademacher":
            raise ValueError(
                f"{matrix.api}: the vectors must be signs, got Hutchinson(distribution="
                f"{self.distribution!r}). Squares of signs are one; write 'rademacher'."
            )
        scatter = Scatter()
        for vectors in self._vectors(matrix):
            scatter.add(vectors * matrix.push(vectors))
        return scatter.result()

    def _vectors(self, matrix: ByProducts) -> Iterator[Tensor]:
        signs = self.distribution == "rademacher"
        return random_rows(matrix, self.num_samples, self.seed, self.chunk_size, signs=signs)
