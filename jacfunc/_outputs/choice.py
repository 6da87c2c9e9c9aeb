"""A choice of outputs as a linear map: from all that a function returns to R numbers.

What comes after it sees a function with these R outputs, and sweeps no other row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._types import Leaves, Tree


@dataclass(frozen=True)
class Returned:
    """What an evaluation has returned, of which some is chosen.

    Args:
        leaves: the differentiable outputs, ``[*lead, *out]``.
        lead: how many dimensions are in front of a sample's own.
        align: gives a value for each leaf, from a tree like the output.
    """

    api: str
    leaves: Leaves
    lead: int
    align: Callable[[Tree], Sequence[Any]]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of one sample's outputs."""
        return [leaf.shape[self.lead :] for leaf in self.leaves]

    @property
    def row(self) -> Tensor:
        """All outputs in a row, ``[*lead, M]``, leaf after leaf."""
        leads = {(leaf.dim() >= self.lead, leaf.shape[: self.lead]) for leaf in self.leaves}
        if len(leads) > 1 or not next(iter(leads))[0]:
            raise Refused("an output does not have the samples in front")
        lead, shapes = self.leaves[0].shape[: self.lead], self.shapes
        pairs = zip(self.leaves, shapes, strict=True)
        rows = [leaf.reshape(*lead, shape.numel()) for leaf, shape in pairs]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def cut(self, row: Tensor) -> Leaves:
        """Leaves ``[*lead, *out]`` from all outputs in a row."""
        parts = row.split([shape.numel() for shape in self.shapes], -1)
        pairs = zip(parts, self.leaves, strict=True)
        return tuple([part.reshape(leaf.shape) for part, leaf in pairs])


class OutputChoice(ABC):
    """What of a function's outputs is asked for, as a linear map of them.

    Its tensors are data of a call, as inputs are: what is remembered of a kind of call serves
    calls with other numbers in them.
    """

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Equal for choices that cost the same."""

    @property
    def tensors(self) -> Leaves:
        """Tensors that it is made of."""
        return ()

    @abstractmethod
    def is_of_samples(self, api: str, size: int | None, ranks: Callable[[], list[int]]) -> bool:
        """Do its tensors hold something for each sample, in front?

        Args:
            size: how many samples there are; None for a call as a whole.
            ranks: evaluates a sample, and tells how many dimensions its outputs have.

        Raises:
            ValueError: if they do, and there are none or other ones.
        """

    @abstractmethod
    def of(self, returned: Returned, own: Leaves) -> Tensor:
        """The numbers ``[*lead, R]`` that are asked for; ``own`` are tensors of the choice."""


class Numbered(OutputChoice):
    """Outputs by their numbers, counted through all outputs of a sample."""

    @abstractmethod
    def numbers(self, api: str, size: int, own: Leaves, device: torch.device) -> Tensor:
        """Which of so many outputs: ``[R]``, or ``[B, R]``.

        Raises:
            ValueError: if there are no such outputs.
        """

    def of(self, returned: Returned, own: Leaves) -> Tensor:
        row = returned.row
        numbers = self.numbers(returned.api, row.shape[-1], own, row.device)
        if numbers.dim() == 1:
            return row.index_select(-1, numbers)
        return row.gather(-1, numbers.expand(*row.shape[:-1], numbers.shape[-1]))

    def completed(self, returned: Returned, own: Leaves, chosen: Tensor) -> Leaves:
        """All outputs, with ``chosen [*lead, R]`` in the place of those that are asked for."""
        row = returned.row.to(chosen.dtype)
        numbers = self.numbers(returned.api, row.shape[-1], own, row.device)
        return returned.cut(row.scatter(-1, numbers.expand(chosen.shape), chosen))


@dataclass(frozen=True)
class SharedNumbers(Numbered):
    """Outputs by numbers or by a slice, which are chosen alike for every sample."""

    chosen: tuple[int, ...] | slice

    @property
    def kind(self) -> Hashable:
        if isinstance(self.chosen, slice):
            return "slice", self.chosen.start, self.chosen.stop, self.chosen.step
        return "numbers", len(self.chosen)

    def is_of_samples(self, api: str, size: int | None, ranks: Callable[[], list[int]]) -> bool:
        return False

    def numbers(self, api: str, size: int, own: Leaves, device: torch.device) -> Tensor:
        if isinstance(self.chosen, slice):
            every = list(range(size)[self.chosen])
            if not every:
                raise ValueError(
                    f"{api}: outputs must choose some of the {size} outputs, got {self.chosen}. "
                    "Leave it out to take all."
                )
        else:
            check_range(api, min(self.chosen), max(self.chosen), size)
            every = [number % size for number in self.chosen]
        return torch.tensor(every, device=device)


@dataclass(frozen=True, eq=False)
class OwnNumbers(Numbered):
    """Outputs of each sample's own, by numbers ``[B, R]``; of a call as a whole ``[R]``.

    Args:
        bounds: the least and the largest number; None if they are known to be right.
        is_of_one: is it meant for one batch? For several it can't be of samples.
    """

    chosen: Tensor
    bounds: tuple[int, int] | None = None
    is_of_one: bool = True

    @property
    def kind(self) -> Hashable:
        return "own numbers", self.chosen.shape[-1]

    @property
    def tensors(self) -> Leaves:
        return (self.chosen,)

    def is_of_samples(self, api: str, size: int | None, ranks: Callable[[], list[int]]) -> bool:
        if self.chosen.dim() == 1:
            return False
        return check_size(api, self.chosen, "[B, R]", size, self.is_of_one)

    def numbers(self, api: str, size: int, own: Leaves, device: torch.device) -> Tensor:
        if self.bounds is not None:
            check_range(api, *self.bounds, size)
        numbers = own[0].to(device)
        return torch.where(numbers < 0, numbers + size, numbers)


def check_range(api: str, least: int, largest: int, size: int) -> None:
    """Refuse numbers of outputs that there are not."""
    if least < -size or largest >= size:
        raise ValueError(
            f"{api}: outputs must be numbers from {-size} to {size - 1}, for {size} outputs, got "
            f"{least if least < -size else largest}. Count through all outputs of a sample, the "
            "last dimension fastest."
        )


def check_size(api: str, tensor: Tensor, form: str, size: int | None, is_of_one: bool) -> bool:
    """Refuse what is not for so many samples, or for those of a call as a whole; return True."""
    if not is_of_one:
        raise ValueError(
            f"{api}: outputs {form} must be for the samples of one batch, got several batches. "
            "Leave out B for all samples alike, or choose by value, as TopK does."
        )
    if tensor.shape[0] != size:
        samples = "a call with per_sample=True" if size is None else f"{size} samples"
        raise ValueError(
            f"{api}: outputs {form} must be for {samples}, got shape {tuple(tensor.shape)}. Leave "
            "out B for all samples alike, or for the call as a whole."
        )
    return True
