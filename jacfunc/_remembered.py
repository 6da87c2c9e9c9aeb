"""What is remembered between calls, by what is called and by the kind of call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

Value = TypeVar("Value")

MOST_KINDS = 100
"""Kinds of calls that are remembered of one function or module."""


class CallKind(NamedTuple):
    """Identity of a call: what is called, and a kind that is equal for calls that cost the same.

    Args:
        callable: the user's function or module.
        kind: trees, shapes, dtypes, devices and plain settings of the arguments.
        version: what is called as it is now: the function itself, or the state of the module,
            of which there is another one after a change.
    """

    callable: Any
    kind: Hashable
    version: Any

    def among(self, *more: Hashable) -> CallKind:
        """A narrower kind: calls that are also equal in ``more``."""
        return CallKind(self.callable, (self.kind, *more), self.version)


class Recent(dict[Any, Value]):
    """A dict of at most ``most`` entries: a new one drives out the oldest.

    Example:
        >>> from jacfunc._remembered import Recent
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
        """Keep a value. Other threads may read meanwhile without the lock."""
        with self._lock:
            self[key] = value
            while len(self) > self.most:
                del self[next(iter(self))]


class Remembered(Generic[Value]):
    """Values by owner (a function, a module, …) and by kind; of each owner the latest kinds.

    Owners are told apart by identity, even where they are equal, and are not kept alive. Nothing is
    remembered of an object that Python can't refer to weakly.

    Example:
        >>> from jacfunc._remembered import Remembered
        >>> costs = Remembered()
        >>> def f(x): return x
        >>> costs.put(f, "small", 1)
        >>> costs.get(f, "small"), costs.get(f, "large"), costs.get(print, "small")
        (1, None, None)
    """

    def __init__(self, most: int = MOST_KINDS) -> None:
        self._most = most
        self._entries: dict[int, tuple[Callable[[], Any], Recent[Value]]] = {}

    def get(self, owner: Any, kind: Hashable) -> Value | None:
        """The value, or None."""
        entry = self._entries.get(id(owner))
        # another object may lie where a dead one was
        return entry[1].get(kind) if entry is not None and entry[0]() is owner else None

    def put(self, owner: Any, kind: Hashable, value: Value) -> None:
        """Remember a value while the owner lives."""
        entry = self._entries.get(id(owner))
        if entry is None or entry[0]() is not owner:
            try:
                reference = self._reference(owner)
            except TypeError:
                return
            entry = self._entries[id(owner)] = reference, Recent(self._most)
        entry[1].put(kind, value)

    def get_or_make(self, owner: Any, kind: Hashable, make: Callable[[], Value]) -> Value:
        """The value; where there is none, what ``make`` returns, which is then remembered."""
        value = self.get(owner, kind)
        if value is None:
            value = make()
            self.put(owner, kind, value)
        return value

    def values(self) -> list[Value]:
        """Everything that is remembered."""
        every = list(self._entries.values())
        return [value for _, kinds in every for value in list(kinds.values())]

    def _reference(self, owner: Any) -> Callable[[], Any]:
        key, this = id(owner), ref(self)

        def forget(dead: object) -> None:
            memory = this()
            entry = None if memory is None else memory._entries.get(key)
            if memory is not None and entry is not None and entry[0] is dead:
                memory._entries.pop(key, None)

        return ref(owner, forget)


class UntilCollected(Remembered[Value]):
    """Values that may lead to their owner: they are forgotten when Python looks for garbage.

    An owner that nobody refers to is gone at once. One that its parts refer to, as hooks do, is
    garbage that Python must look for; what is remembered of it would keep it alive.

    Example:
        >>> import gc
        >>> from jacfunc._remembered import UntilCollected
        >>> states = UntilCollected()
        >>> states.put(print_twice := lambda: None, "state", [print_twice])
        >>> del print_twice
        >>> len(states.values()), gc.collect() > 0, len(states.values())
        (1, True, 0)
    """

    def __init__(self, most: int = MOST_KINDS) -> None:
        super().__init__(most)
        gc.callbacks.append(self._at_collection)  # for good: it is as old as the process

    def _at_collection(self, phase: str, info: Mapping[str, int]) -> None:
        # the youngest objects are looked through too often, and a state is soon none of them
        if phase == "start" and info["generation"] > 0:
            self._entries.clear()
