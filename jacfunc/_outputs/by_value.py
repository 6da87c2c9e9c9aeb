"""Outputs that are chosen by their values, which must be evaluated before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jacfunc._arguments import whole
from jacfunc._trees import Split
from jacfunc._types import Leaves, Tree


class ByValue(ABC):
    """A choice of ``k`` outputs that depends on the outputs of a sample.

    Args:
        k: how many.
        dim: a dimension of a sample's output, of which k are chosen at each place of the others;
            None to choose among all outputs.
    """

    k: int
    dim: int | None

    @abstractmethod
    def scores(self, values: Tensor, first: int) -> Tensor:
        """Scores ``[B, *out]`` of values ``[B, *out]``: those with the largest are chosen.

        Args:
            first: the number of the first sample.
        """

    def indices(self, outputs: Tree) -> Tensor:
        """The numbers ``[B, R]`` of the chosen outputs of every sample, as ``outputs=`` takes them.

        Args:
            outputs: what the module returned for a batch, which is in front.

        Raises:
            ValueError: if there are no k outputs, or no such dimension.
        """
        return self.numbers_of(type(self).__name__, Split.of(outputs).leaves)

    def numbers_of(self, api: str, outputs: Leaves, first: int = 0) -> Tensor:
        """The numbers ``[B, R]`` of the chosen outputs, from leaves ``[B, *out]``."""
        if self.dim is None:
            sizes = [leaf.shape[1:].numel() for leaf in outputs]
            pairs = zip(outputs, sizes, strict=True)
            row = torch.cat([leaf.detach().reshape(len(leaf), size) for leaf, size in pairs], 1)
            return self._largest(api, self.scores(row, first))
        numbers, start = [], 0
        for leaf in outputs:
            size = leaf.shape[1:].numel()
            dim = self._dim_of(api, leaf)
            largest = self._largest(api, self.scores(leaf.detach().movedim(dim, -1), first))
            places = torch.arange(start, start + size, device=leaf.device).view(leaf.shape[1:])
            places = places.movedim(dim - 1, -1).expand(*largest.shape[:-1], leaf.shape[dim])
            numbers.append(places.gather(-1, largest).flatten(1))
            start += size
        return torch.cat(numbers, 1)

    def _dim_of(self, api: str, leaf: Tensor) -> int:
        """The dimension of an output ``[B, *out]`` that k are chosen of."""
        rank, dim = leaf.dim() - 1, self.dim
        assert dim is not None
        if not -rank <= dim < rank:
            raise ValueError(
                f"{api}: dim of {type(self).__name__} must be a dimension of one sample's output, "
                f"got {dim} for one of {rank}. Count without the batch, or leave it out."
            )
        return dim % rank + 1

    def _largest(self, api: str, scores: Tensor) -> Tensor:
        if self.k > scores.shape[-1]:
            raise ValueError(
                f"{api}: k of {type(self).__name__} must be at most the {scores.shape[-1]} "
                f"outputs, got {self.k}. Choose fewer, or leave outputs out to take all."
            )
        return scores.topk(self.k, -1).indices

    def __post_init__(self) -> None:
        """Refuse numbers that are none."""
        name = type(self).__name__
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(
                f"{name}: k must be a positive number of outputs, got {self.k!r}. Write "
                f"{name}(5) for five rows."
            )
        if self.dim is not None and (not isinstance(self.dim, int) or isinstance(self.dim, bool)):
            raise TypeError(
                f"{name}: dim must be a dimension of one sample's output or None, got "
                f"{self.dim!r}. Count without the batch: -1 is the last."
            )


@dataclass(frozen=True)
class TopK(ByValue):
    """The ``k`` largest outputs of every sample, the largest first, as a value of ``outputs=``.

    Args:
        k: how many.
        dim: a dimension of a sample's output, of which k are chosen at each place of the others:
            ``-1`` for the classes of every step. None chooses among all outputs.

    Raises:
        TypeError, ValueError: if ``k`` is no positive number, or ``dim`` no dimension.

    Cost:
        An evaluation of the samples more: the numbers of the outputs are fixed before the call.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(3, 10), torch.randn(4, 3)
        >>> jac = jacfunc.module_jacobian(model, per_sample=True, outputs=jacfunc.TopK(2))
        >>> jac(x)["weight"].shape
        torch.Size([4, 2, 10, 3])
        >>> jacfunc.TopK(2).indices(torch.tensor([[0.0, 3.0, 1.0]]))
        tensor([[1, 2]])
    """

    k: int
    dim: int | None = None

    def scores(self, values: Tensor, first: int) -> Tensor:
        return values


@dataclass(frozen=True)
class Sampled(ByValue):
    """``k`` different outputs of every sample, drawn at random, as a value of ``outputs=``.

    They are drawn without replacement, by the largest of ``log p + noise`` with Gumbel noise (Kool,
    van Hoof, Welling, "Stochastic beams and where to find them", 2019). Seed and number of the
    sample fix the noise, whatever the chunks.

    Args:
        k: how many.
        seed: of the draws.
        dim: a dimension of a sample's output, of which k are drawn at each place of the others:
            ``-1`` for the classes of every step. None draws among all outputs.
        chances: ``"softmax"`` of the outputs along that dimension, as of logits; or ``"uniform"``.

    Raises:
        TypeError, ValueError: if ``k`` is no positive number, ``seed`` no number, ``dim`` no
            dimension, or if there are no such chances.

    Cost:
        An evaluation of the samples more: the numbers of the outputs are fixed before the call.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(3, 10), torch.randn(4, 3)
        >>> draws = jacfunc.Sampled(2, seed=0)
        >>> jacfunc.module_jacobian(model, per_sample=True, outputs=draws)(x)["bias"].shape
        torch.Size([4, 2, 10])
        >>> draws.indices(model(x)).shape
        torch.Size([4, 2])
    """

    k: int
    seed: int = 0
    dim: int | None = None
    chances: Literal["softmax", "uniform"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Sampled", "seed", self.seed, "The same seed gives the same draws.")
        if not isinstance(self.chances, str) or self.chances not in ("softmax", "uniform"):
            raise ValueError(
                f"Sampled: chances must be 'softmax' or 'uniform', got {self.chances!r}. Draw as "
                "a classifier with these logits does, or all alike."
            )

    def scores(self, values: Tensor, first: int) -> Tensor:
        device = values.device
        noise = torch.empty(values.shape, dtype=torch.float64, device=device)
        for number, of_sample in enumerate(noise, first):
            generator = torch.Generator(device).manual_seed(hash((self.seed, number)) % 2**63)
            of_sample.exponential_(generator=generator)
        gumbel = -noise.log()  # of numbers with an exponential distribution
        return gumbel if self.chances == "uniform" else values.double() + gumbel
