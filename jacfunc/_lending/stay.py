"""What is in place of a module's tensors, from when it is first lent until it is as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._lending.part import Attributes, ModulePart


@dataclass(eq=False, slots=True)
class Lease:
    """What one evaluation was given and has left, while something else is in its place."""

    given: Iterable[Tensor] = ()
    arguments: Any = None
    attributes: list[Attributes] | None = None


@dataclass(eq=False, slots=True)
class Stay:
    """From when a module is first lent until all is as it was."""

    api: str
    parts: list[ModulePart]
    before: list[Attributes]
    lease: Lease | None = None
    """Of the evaluation whose tensors are in place."""

    def clear(self) -> None:
        """All as it was; what the last evaluation was given is kept for its pullbacks."""
        if self.lease is not None:
            self.lease.attributes = [part.now() for part in self.parts]
            self.lease.given, self.lease.arguments, self.lease = (), None, None
        for part, attributes in zip(self.parts, self.before, strict=True):
            part.give_back(attributes)

    def renew(self, lease: Lease) -> None:
        """What an earlier evaluation was given is in place again."""
        if self.lease is lease or lease.attributes is None:
            return
        self.clear()
        for part, attributes in zip(self.parts, lease.attributes, strict=True):
            part.give_back(attributes)
        self.lease = lease
