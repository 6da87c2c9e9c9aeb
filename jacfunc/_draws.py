"""Random numbers that are drawn over and over: the same ones, others, or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

from jacfunc._check import RANDOM, Refused
from jacfunc._types import Leaves

State: TypeAlias = tuple[torch.Tensor, ...]


class Draws:
    """The generators of the devices that leaves are on, as they stood when this was made."""

    def __init__(self, leaves: Leaves) -> None:
        indices = sorted({leaf.device.index for leaf in leaves if leaf.is_cuda})
        cuda = [torch.cuda.default_generators[index] for index in indices]
        self._generators = [torch.default_generator, *cuda]
        self._states = self._now()

    def repeat(self) -> None:
        """Back to where they stood."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)

    def were_taken(self) -> bool:
        """Has a generator moved on since this was made?"""
        return not all(map(torch.equal, self._states, self._now()))

    @contextmanager
    def of_one(self, randomness: str) -> Iterator[None]:
        """Around each of several evaluations, to draw as vmap does under the same word."""
        if randomness == "same":
            self.repeat()
        before = self._now()
        yield
        if randomness == "error" and not all(map(torch.equal, before, self._now())):
            raise Refused(RANDOM)

    def _now(self) -> State:
        return tuple(generator.get_state() for generator in self._generators)
