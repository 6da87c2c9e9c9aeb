"""What a sweep may read of an evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import ref

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jacfunc._errors import Nameless

_KIND, _VERSION = attrgetter("shape", "dtype"), attrgetter("_version")

MOST_BYTES = 2**25
"""What makes a result of more takes so long that it does not matter what calls it."""

MOST_KEPT = 2**26
"""So many bytes are saved, and as many made and kept, while a sweep is written down."""


@dataclass(eq=False)
class Sources:
    """Tensors of an evaluation that a sweep may read.

    Args:
        saved: what autograd has saved, in order.
        versions: how often torch had written into each of these by then.
        arguments: what operations got, by the numbers of these.
    """

    saved: list[Tensor] = field(default_factory=list)
    bytes_left: int = MOST_KEPT  # what shares memory is counted each time
    versions: list[int] = field(default_factory=list)
    arguments: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def are_as_saved(self) -> bool:
        """Was nothing of it written into since? Torch compares that where it sweeps a graph."""
        return [*map(_VERSION, self.saved)] == self.versions

    @property
    def kinds(self) -> list[Any]:
        """Shapes and dtypes of what operations got, of constants, too."""
        return [*map(_KIND, chain.from_iterable(self.arguments.values()))]

    def saving(self) -> AbstractContextManager[None]:
        """A context in which autograd tells what it saves, and gets it back from here.

        Raises:
            Nameless: if that is more than is kept beside the graph of an answer before.
        """
        # a graph that held its own tensors by such hooks would never be freed
        here = ref(self)

        def keep(tensor: Tensor) -> int:
            sources: Sources = here()  # type: ignore[assignment]
            sources.bytes_left -= tensor.nbytes
            if sources.bytes_left < 0:
                raise Nameless("it saves more than is kept while a sweep is written down")
            sources.saved += (tensor,)
            sources.versions += (tensor._version,)
            return len(sources.saved) - 1

        def kept(number: int) -> Tensor:
            if (sources := here()) is None:
                raise RuntimeError("what a module returned inside a call is gone after the call")
            return sources.saved[number]

        hooks: AbstractContextManager[None] = saved_tensors_hooks(keep, kept)
        return hooks
