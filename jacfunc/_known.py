"""What was found out about functions and modules, for as long as they live."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

MOST_KINDS = 100
"""Of calls of one function."""


class KnownKinds:
    """Kinds of calls that need not be looked at again, by what is called.

    Example:
        >>> from jacfunc._known import KnownKinds
        >>> known = KnownKinds()
        >>> def f(x): return x
        >>> known.add(f, "small")
        >>> known.has(f, "small"), known.has(f, "large")
        (True, False)
    """

    def __init__(self) -> None:
        self._kinds: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()

    def has(self, called: Any, kind: Hashable) -> bool:
        """Has it been looked at?"""
        try:
            return kind in self._kinds.get(called, ())
        except TypeError:  # neither hashed nor referred to weakly
            return False

    def add(self, called: Any, kind: Hashable) -> None:
        """It has; where it can't be referred to, it will be again."""
        try:
            kinds = self._kinds.setdefault(called, set())
        except TypeError:
            return
        if len(kinds) < MOST_KINDS:
            kinds.add(kind)
