"""Bad inputs of every public name: a file for each family of doors, each with a list ``ROWS``.

``tests/house/test_bad_inputs.py`` collects the rows of all files here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Bad(NamedTuple):
    """A call that must be refused in words.

    Args:
        door: the public name that is called, or that words begin with.
        name: what is bad about it; unique for each door.
        call: makes the call.
        error: the type of the error, exactly or a subclass of it.
        words: a regular expression for what comes after the door's name.
    """

    door: str
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: str
