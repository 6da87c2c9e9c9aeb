"""The state of a module from call to call."""

from __future__ import annotations

from torch import nn

from jacfunc._lending.select import Select
from jacfunc._lending.state import ModuleState
from jacfunc._lock import alone


class CurrentState:
    """The state in which each call finds a module; made anew only where the module has changed.

    Args:
        stays: does every call get a copy of the state of the first?
    """

    def __init__(self, api: str, module: nn.Module, select: Select, stays: bool = False) -> None:
        self._api, self._module, self._select, self._stays = api, module, select, stays
        self._last: ModuleState | None = None

    def now(self) -> ModuleState:
        """The state at a call that begins."""
        if self._stays and self._last is not None:
            return self._last
        with alone():  # while another thread lends the module, its parameters are not its own
            state = ModuleState.after(self._last, self._api, self._module, self._select)
            self._last = state.copied() if self._stays else state
        return self._last
