"""Parameters that a function holds while it runs, and what it does with them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from jacfunc._factored.views import Path
from jacfunc._torch import below_transforms

UNSEEN_WRITE = (
    "a parameter must be written into by operations that Python sees, or from the first call on, "
    "got a write by others, which has changed it. Write into a copy of it."
)


@dataclass(frozen=True)
class TrackedParameter:
    """A parameter, or a view of one, that a function holds."""

    number: int
    held: Tensor
    twin: Tensor
    """What uses that have a rule get in its place: so the graph tells what no rule has seen."""
    path: Path
    version: int

    @property
    def is_intact(self) -> bool:
        """Has nobody written into it?"""
        return below_transforms(self.held)._version == self.version


@dataclass(frozen=True)
class UnruledUse:
    """Parameters, by number, that an operation without a rule was given, or would have been."""

    given: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """Those of them that are not what they were."""
