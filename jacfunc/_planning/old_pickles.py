"""Pickles name a class by the module in which it lay: these are the names of older versions."""

from __future__ import annotations

import sys
from types import ModuleType

from jacfunc._forecasting import Forecast
from jacfunc._memory import FittedChunks
from jacfunc._planning.auto import Auto
from jacfunc._planning.autotune import Autotune
from jacfunc._planning.plan import Plan


class Within:
    """The first name of :class:`FittedChunks`, which had fewer fields."""

    def __new__(cls) -> FittedChunks:  # type: ignore[misc]
        """An object for the pickle to fill."""
        return FittedChunks(room=1)


FIRST_NAMES = {
    "jacfunc._autotune": Autotune,
    "jacfunc._chunks": Within,
    "jacfunc._forecast": Forecast,
    "jacfunc._planner": Auto,
    "jacfunc._plans": Plan,
}


def load_old_pickles() -> None:
    """Let ``pickle`` find the classes where they lay."""
    for name, cls in FIRST_NAMES.items():
        module = sys.modules.setdefault(name, ModuleType(name, "A class that has moved."))
        setattr(module, cls.__name__, cls)
