"""Functions of Python and C that something calls, counted: what no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.house.moves import HOUSE


def num_calls(run: Callable[[], object], counts: Callable[[FrameType, str, Any], bool]) -> int:
    """How many events of ``run`` count, of those that :func:`sys.setprofile` tells."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += counts(frame, event, argument)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def is_call(frame: FrameType, event: str, argument: Any) -> bool:
    """Is a function of Python or C called?"""
    return event in ("call", "c_call")


def is_own(frame: FrameType, event: str, argument: Any) -> bool:
    """Is a function of jacfunc called?"""
    return event == "call" and frame.f_code.co_filename.startswith(HOUSE)
