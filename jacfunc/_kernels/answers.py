"""What is made of rows again and again, written down once they are of a known kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch

from jacfunc._log import note
from jacfunc._torch import is_undisturbed
from jacfunc._traces import MOST_BYTES, WrittenWork
from jacfunc._types import Leaves

FEWEST_ANSWERS = 4
"""The answer of this number is written down; by then a kind of call has been made more often."""


class Answers:
    """What is made of tensors of one kind, by names: as straight programs after some calls."""

    def __init__(self) -> None:
        self._counts, self._written = Counter[Hashable](), dict[Hashable, WrittenWork]()

    def made(self, name: Hashable, make: Callable[[], Leaves], sources: Leaves) -> Leaves:
        """The answer of this name: what ``make`` makes of the sources, and of nothing else."""
        if not is_undisturbed():
            return make()
        with torch.set_grad_enabled(False):
            written = self._written.get(name)
            result = None if written is None else written.result(sources)
            if result is None:
                result = make()
                self._counts[name] += 1
                if self._counts[name] == FEWEST_ANSWERS:
                    self._learn(name, make, sources, result)
        return result

    def _learn(
        self, name: Hashable, make: Callable[[], Leaves], sources: Leaves, expected: Leaves
    ) -> None:
        """Write down how an answer is made, if that can be."""
        if sum(x.nbytes for x in expected) > MOST_BYTES:
            return
        try:
            written = WrittenWork(make, sources)
            is_right = written.gives(sources, expected)
        except Exception as error:  # it goes on as before
            note("an answer from rows is not written down: %s", error)
            return
        if is_right:
            self._written[name] = written
