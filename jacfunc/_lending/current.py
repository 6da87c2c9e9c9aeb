"""The state of a module from call to call."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from jacfunc._lending.attributes import detached_copy
from jacfunc._lending.originals import Originals
from jacfunc._lending.select import Select
from jacfunc._lending.state import ModuleState
from jacfunc._lock import alone
from jacfunc._trees import flatten
from jacfunc._types import Tree, is_tensor


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

    def kept(self, data: Tree, copy: bool) -> tuple[ModuleState, Tree]:
        """The state at a call that begins, and its data, for answers that come later.

        They are copies. Without ``copy`` they are the module and the data themselves, and each
        answer is refused if these have changed.
        """
        state = self.now()
        if copy:
            return state.copied(), detached_copy(data)
        of_module = (state.point, state.params, state.buffers, state.hidden)
        tensors = [x for named in of_module for x in named.values()]
        tensors += filter(is_tensor, flatten(data)[0])
        originals = Originals(state.snapshot, tensors)
        return replace(state, originals=originals, origin=state, loans=[]), data
