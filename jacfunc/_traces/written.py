"""A work that is written down once, and done again at other tensors of the same kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jacfunc._torch import Graphs
from jacfunc._traces.backends import Compiler
from jacfunc._traces.executable import Executable
from jacfunc._traces.tape import written_down
from jacfunc._types import Leaves


class WrittenWork:
    """A work that reads nothing but its sources, as operators that run one after the other.

    Args:
        work: is done once, to be written down.
        sources: all tensors that it gets from outside.
        most_bytes: it is given up where the work makes more than so many bytes.

    Raises:
        Nameless: if it can't be written down.
    """

    def __init__(self, work: Callable[[], Leaves], sources: Leaves, most_bytes: int) -> None:
        graph = written_down(work, sources, most_bytes)
        nodes = [*graph.graph.nodes]
        detached = tuple([source.detach() for source in sources])
        self._executable = Executable(graph, detached, 0, Compiler("replay"))
        self._executable(detached)  # what it is made of is not needed any more
        for node in (*nodes, *self._executable.graph.graph.nodes):
            node.meta.clear()  # which holds all that was computed
        # the tape knows tensors by where they lie: two at one place were one to it
        self._aliases = _repeated([x.data_ptr() for x in sources])
        self.hold_for(sources)

    def hold_for(self, sources: Leaves) -> None:
        """From now on it holds for sources of the kinds of these, under the settings of now."""
        self._count, self._repeated = len(sources), _repeated(list(map(id, sources)))
        self._are_alike = Graphs.guard_of_tensors(self._each_once(sources))
        self._are_settings = Graphs.guard_of_settings()

    def result(self, sources: Leaves) -> Leaves | None:
        """What the work makes of these sources; None if it does not hold for them."""
        repeated = self._repeated.items()
        if len(sources) != self._count or any(sources[n] is not sources[k] for n, k in repeated):
            return None
        if not (self._are_alike(*self._each_once(sources)) and self._are_settings()):
            return None
        pairs = self._aliases.items()
        if any(sources[n].data_ptr() != sources[first].data_ptr() for n, first in pairs):
            return None
        return tuple(self._executable(sources))

    def _each_once(self, sources: Leaves) -> Leaves:
        """The sources without those that are repeated: torch's guard refuses to get one twice."""
        repeated = self._repeated
        return tuple([source for n, source in enumerate(sources) if n not in repeated])


def _repeated(marks: Sequence[int]) -> dict[int, int]:
    """Numbers of marks that equal an earlier one, with the number of that."""
    first: dict[int, int] = {}
    numbers = {n: first.setdefault(mark, n) for n, mark in enumerate(marks)}
    return {n: earlier for n, earlier in numbers.items() if n != earlier}
