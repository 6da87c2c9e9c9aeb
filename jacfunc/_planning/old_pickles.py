"""Lets ``pickle`` find classes by the names of modules in which they lay in older versions."""

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

for name, moved in FIRST_NAMES.items():
    setattr(sys.modules.setdefault(name, ModuleType(name)), moved.__name__, moved)
