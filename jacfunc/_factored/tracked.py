"""What a function has of each parameter while it runs, and what it does without a rule."""

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
    """A tensor that a function has, which is a parameter or a view of one."""

    number: int
    handle: Tensor
    """The tensor, known by its identity."""
    twin: Tensor
    """Operations with a rule get it in place of the handle."""
    path: Path
    """The views that lead from the parameter to the handle."""
    version: int

    @property
    def is_intact(self) -> bool:
        """Has nothing written into the tensor since it is tracked?"""
        return below_transforms(self.handle)._version == self.version


@dataclass(frozen=True)
class UnruledUse:
    """Parameters, by number, that operations without a rule have got as arguments."""

    numbers: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """Those that were written into, or may have been."""
