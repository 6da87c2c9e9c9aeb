"""What was found out about functions and modules, for as long as they live."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import ref

Value = TypeVar("Value")

MOST_KINDS = 100
"""Of calls of one function."""


class Recent(dict[Any, Value]):
    """A dict of at most so many entries: for a new one the oldest is forgotten.

    Example:
        >>> from jacfunc._known import Recent
        >>> recent = Recent(2)
        >>> for number in range(4):
        ...     recent.put(number, number)
        >>> list(recent)
        [2, 3]
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self._lock = Lock()

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value. Whoever reads meanwhile, in another thread, needs no lock."""
        with self._lock:
            self[key] = value
            while len(self) > self.most:
                del self[next(iter(self))]


class Remembered(Generic[Value]):
    """Values by what is called, and by the kind of call.

    What is called is told by its identity, whatever it is equal to, and is not kept alive by what
    is remembered of it; nothing is remembered of what Python can't refer to weakly. Of each the
    latest kinds of calls are kept. A copy, pickled or not, remembers nothing.

    Example:
        >>> from jacfunc._known import Remembered
        >>> costs = Remembered()
        >>> def f(x): return x
        >>> costs.put(f, "small", 1)
        >>> costs.get(f, "small"), costs.get(f, "large"), costs.get(print, "small")
        (1, None, None)
    """

    def __init__(self, most: int = MOST_KINDS) -> None:
        self._most = most
        self._of: dict[int, tuple[Callable[[], Any], Recent[Value]]] = {}

    def get(self, called: Any, kind: Hashable) -> Value | None:
        """What is remembered, if anything is."""
        entry = self._of.get(id(called))
        # an object that came to lie where another one was is not that one
        return entry[1].get(kind) if entry is not None and entry[0]() is called else None

    def put(self, called: Any, kind: Hashable, value: Value) -> None:
        """Remember it while what is called lives."""
        entry = self._of.get(id(called))
        if entry is None or entry[0]() is not called:
            try:
                reference = self._reference(called)
            except TypeError:
                return
            entry = self._of[id(called)] = reference, Recent(self._most)
        entry[1].put(kind, value)

    def values(self) -> list[Value]:
        """All that is remembered."""
        return [value for _, kinds in list(self._of.values()) for value in list(kinds.values())]

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values())

    def __len__(self) -> int:
        return len(self.values())

    def __reduce__(self) -> tuple[type[Remembered[Value]], tuple[int]]:
        return type(self), (self._most,)

    def _reference(self, called: Any) -> Callable[[], Any]:
        key, owner = id(called), ref(self)

        def forget(dead: object) -> None:
            memory = owner()
            entry = None if memory is None else memory._of.get(key)
            if memory is not None and entry is not None and entry[0] is dead:
                memory._of.pop(key, None)

        return ref(called, forget)


def nothing_yet() -> Remembered[Any]:
    """An empty memory, as a default of dataclasses: the compiler calls functions there alone."""
    return Remembered()
