"""A number with its error, and a matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import whole
from jacfunc._torch import is_batched, outside_transforms
from jacfunc._types import RowMap


@dataclass(frozen=True)
class Approximation:
    """What an estimator answers: a value, and how far it is off.

    Args:
        value: the estimate: a number, or a tree of them.
        standard_error: of the value, in the same form: one standard deviation, estimated from the
            scatter of the samples. Of :class:`Lanczos` it is no statistic: see there.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.estimators import Hutchinson
        >>> from jacfunc.operators import trace
        >>> value, J = jacfunc.linearize(lambda x: 2 * x, torch.ones(1000))
        >>> trace(J, Hutchinson(10))  # of a diagonal matrix random signs give the exact trace
        Approximation(value=tensor(2000.), standard_error=tensor(0.))
    """

    value: Any
    standard_error: Any


@dataclass(frozen=True)
class ByProducts:
    """A matrix ``[M, N]`` that is known by its products alone.

    Args:
        api: the public function that asks, with which error messages begin.
        shape: ``(M, N)``.
        dtype: in which is computed, at least float32.
        device: where the products are.
        rounding: the relative error of a product's numbers.
        push: ``A v`` of K vectors in rows, ``[K, N]`` → ``[K, M]``.
        pull: ``Aᵀ u`` of K vectors in rows, ``[K, M]`` → ``[K, N]``.
        diagonal: the exact diagonal ``[N]``, by products with unit vectors.
    """

    api: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    rounding: float
    push: RowMap
    pull: RowMap
    diagonal: Callable[[], Tensor]

    def exact_trace(self) -> Approximation:
        """The trace of the exact diagonal, where an estimate would take as many products."""
        value = self.diagonal().sum()
        return Approximation(value, torch.zeros_like(value, requires_grad=False))


def by_chunks(products_of: RowMap, rows: Tensor, chunk_size: int | None) -> Tensor:
    """Products of K vectors in rows, so many at once."""
    if chunk_size is None or len(rows) <= chunk_size:
        return products_of(rows)
    return torch.cat([products_of(chunk) for chunk in rows.split(chunk_size)])


def random_rows(
    matrix: ByProducts, count: int, seed: int, chunk_size: int | None, *, signs: bool
) -> Iterator[Tensor]:
    """Random vectors ``[K, N]`` of variance one, in chunks: signs, or normal numbers.

    Drawn on a CPU, row by row: neither the device nor the chunks change them.
    """
    generator, size = torch.Generator().manual_seed(seed), matrix.shape[1]

    def row() -> Tensor:
        if signs:
            bits = torch.randint(2, (size,), generator=generator, dtype=torch.int8, device="cpu")
            return bits * 2 - 1
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    step = chunk_size or count
    for start in range(0, count, step):
        with outside_transforms():  # a vmap would refuse to draw
            rows = torch.stack([row() for _ in range(min(step, count - start))])
        yield rows.to(matrix.device, matrix.dtype)


class Scatter:
    """The mean of samples that come chunk by chunk, and its standard error.

    Squares are summed about the mean of each chunk, and chunks are merged after Chan, Golub and
    LeVeque 1983. Means are taken from the first sample on: equal samples have no error.
    """

    def __init__(self) -> None:
        self._count = 0
        self._total: Tensor | float = 0.0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, samples: Tensor) -> None:
        """Take ``[K, *shape]`` more samples."""
        numbers, count = samples.detach(), len(samples)
        mean = numbers[0] + (numbers - numbers[0]).mean(0)
        step, together = mean - self._mean, self._count + count
        squares = (numbers - mean).square().sum(0) + step**2 * (self._count * count / together)
        self._total = self._total + samples.sum(0)
        self._squares, self._mean = self._squares + squares, self._mean + step * (count / together)
        self._count = together

    def result(self) -> Approximation:
        """Mean and standard error of all samples."""
        count = self._count
        error = torch.as_tensor(self._squares).div(count * (count - 1)).sqrt()
        return Approximation(self._total / count, error)


def check_readable(matrix: ByProducts, products: Tensor) -> None:
    """Refuse products of which an estimator could not read the numbers."""
    if is_batched(products):
        raise NotImplementedError(
            f"{matrix.api}: the estimator must read numbers of products, got a call inside vmap. "
            "Loop over the samples, or take the exact value."
        )


def check_count(api: str, name: str, count: object, least: int) -> None:
    """Refuse all but whole numbers from the least on."""
    if whole(api, name, count, "It counts vectors or products.") < least:
        raise ValueError(
            f"{api}: {name} must be at least {least}, got {count}. With fewer no error can be told."
        )


def check_seed(api: str, seed: object) -> None:
    """Refuse what is no seed of a generator."""
    advice = "The same seed gives the same vectors."
    if not 0 <= whole(api, "seed", seed, advice) < 2**63:
        raise ValueError(f"{api}: seed must be between 0 and 2**63 - 1, got {seed}. {advice}")
