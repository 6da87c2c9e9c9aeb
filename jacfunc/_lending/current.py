"""The state of a module from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.overrides import has_torch_function

from jacfunc._errors import check_uncompiled
from jacfunc._faults import apart, is_watching
from jacfunc._lending.attributes import detached_copy
from jacfunc._lending.constants import versions_of
from jacfunc._lending.originals import Casting, Originals
from jacfunc._lending.part import are_same
from jacfunc._lending.select import Select, select_params
from jacfunc._lending.state import ModuleState
from jacfunc._lock import alone
from jacfunc._memory import MOST_COPIED_BYTES
from jacfunc._remembered import UntilCollected
from jacfunc._torch import is_outermost, recording
from jacfunc._trees import flatten
from jacfunc._types import Tree, is_tensor

_IS_TRAINABLE = attrgetter("requires_grad")


def check_outermost(api: str, data: Tree, instead: str = "module_jacobian") -> None:
    """Refuse a call where no graph of an evaluation is kept, or where its result must have one.

    Args:
        data: the arguments of the call, whose result is detached.
        instead: what to call inside a transform.

    Raises:
        NotImplementedError: inside a transform, and under torch.compile.
        ValueError: with arguments that were computed with gradients in a function of which another
            derivative is taken, as that would be zero without a word.
    """
    check_uncompiled(api)
    if not is_outermost():
        raise NotImplementedError(
            f"{api}: the graph of an evaluation must be kept, got a call inside a transform, "
            f"which keeps none. Use {instead} there."
        )
    # a watch is a mode: where torch knows of none, there is no more to ask
    if not (has_torch_function((data,)) and torch.is_grad_enabled() and is_watching()):
        return
    if any(getattr(x, "grad_fn", None) is not None for x in flatten(data)[0]):
        raise ValueError(
            f"{api}: inside another derivative the result must keep its graph, got a call whose "
            "result has none, and whose derivative would be zero. Use module_jacobian with "
            "create_graph=True, or detach what the call gets, if its result is a constant."
        )


class CurrentState:
    """The state in which each call finds a module; made anew only where the module has changed.

    Args:
        stays: does every call get a copy of the state of the first?
        kind: the class of the state.
    """

    def __init__(
        self,
        api: str,
        module: nn.Module,
        select: Select,
        stays: bool = False,
        kind: type[ModuleState] = ModuleState,
    ) -> None:
        self._api, self._module, self._select, self._stays = api, module, select, stays
        self._kind = kind
        self._last: ModuleState | None = None
        self._by_names = not (callable(select) or isinstance(select, Mapping))
        self._trainable: list[bool] = []
        """Which parameters of the last state required a gradient: names choose among these."""
        self._is_shared = kind is ModuleState and isinstance(select, str | None)
        """May other doors use its states, too?"""

    def now(self) -> ModuleState:
        """The state at a call that begins."""
        if self._stays and self._last is not None:
            return self._last
        with alone():  # while another thread lends the module, its parameters are not its own
            return self.found()

    def found(self) -> ModuleState:
        """The state of the module at a call that begins, for a caller that holds the lock."""
        if not self._stays:
            self._last = self._state_now()
        elif self._last is None:
            self._last = copied(self._state_now())
        return self._last

    def _state_now(self) -> ModuleState:
        """The state before, unless an object was replaced: to look takes a tenth of the time."""
        last, select = self._last or self._shared(), self._select
        if last is None or not last.snapshot.is_current():
            state = self._kind.of(self._api, self._module, select)
            self._trainable = [*map(_IS_TRAINABLE, state.params.values())]
            self._share(state)
            return state
        trainable = [*map(_IS_TRAINABLE, last.params.values())]
        if self._by_names and trainable and trainable == self._trainable:
            return last
        point = select_params(self._api, last.params, select)
        self._trainable = trainable
        state = last if are_same(point, last.point) else replace(last, point=point)
        self._share(state)
        return state

    def _shared(self) -> ModuleState | None:
        """The state in which a call through another door has found the module, if there was one."""
        known = _shared().get(self._module, self._select) if self._is_shared else None
        if known is None:
            return None
        state, self._trainable = known
        return _owning(state, self._module)

    def _share(self, state: ModuleState) -> None:
        """Keep a state for the calls through other doors, as long as the module lives.

        Not one that takes much memory, which a module may be rid of before; nor one of which not
        all can be compared, or of a module that is lent just now.
        """
        if not (self._is_shared and state.is_plain):
            return
        tensors = *state.params.values(), *state.hidden.values(), *state.buffers.values()
        are_own = all(x.is_leaf and x.layout == torch.strided for x in tensors)
        if are_own and sum(x.nbytes for x in tensors) <= MOST_COPIED_BYTES:
            _shared().put(self._module, self._select, (_owning(state, None), self._trainable))

    def kept(self, data: Tree, copy: bool) -> tuple[ModuleState, Tree]:
        """The state at a call that begins, and its data, for answers that come later.

        They are copies. Without ``copy`` they are the module and the data themselves, and each
        answer is refused if these have changed.
        """
        state = self.now()
        casting = Casting.now(tuple(state.params.values()))
        if copy:
            return copied(state, casting), detached_copy(data)
        of_module = (state.point, state.params, state.buffers, state.hidden)
        tensors = [x for named in of_module for x in named.values()]
        tensors += filter(is_tensor, flatten(data)[0])
        originals = Originals(state.snapshot, tensors)
        then = {"originals": originals, "casting": casting, "hooked": state.hooks()}
        return _with(state, **then, origin=state, loans=[]), data


def _owning(state: ModuleState, module: nn.Module | None) -> ModuleState:
    """A state with all that is known of another one, which keeps the module alive.

    Without a module it keeps none, so that it can be remembered. Its version is known before.
    """
    return _with(state, module=module, version=state.version)


def _with(state: ModuleState, **others: Any) -> ModuleState:
    """A state with all that is known of another one, what was computed once too, but for others."""
    same = object.__new__(type(state))
    vars(same).update(vars(state), **others)
    return same


@cache
def _shared() -> UntilCollected[tuple[ModuleState, list[bool]]]:
    """The last state of each module, and which parameters required a gradient."""
    return UntilCollected()


def copied(state: ModuleState, casting: Casting | None = None) -> ModuleState:
    """A state with copies of all values, for evaluations after these may have changed.

    It keeps where autocast was on, for answers that come later.
    """
    if state.is_copy:
        return state if casting is None else replace(state, casting=casting)
    every = (*state.params.values(), *state.hidden.values(), *state.buffers.values())
    new: dict[int, Any] = dict(zip(map(id, every), every, strict=True))
    # values to differentiate at may be no parameters of the module
    point = state.point.values()
    known = new | dict(zip(map(id, point), point, strict=True))
    with recording():  # graphs of attributes tell what was computed before
        copies = dict(zip(known, apart(known.values()), strict=True))
        # identities, and how often torch has written into each
        versions = zip(known, versions_of(known.values()), strict=True)
        parts = {n: part.copied(new) if part.plain else part for n, part in state.parts.items()}
        beside = [part.copied(new) if part.plain else part for part in state.beside]
        return _with(
            state,
            parts=parts,
            beside=beside,
            every_part=[*parts.values(), *beside],
            point=dict(zip(state.point, map(copies.__getitem__, map(id, point)), strict=True)),
            copies=copies,
            copied_versions=dict(zip(map(id, copies.values()), versions, strict=True)),
            is_copy=True,
            casting=casting,
            hooked=state.hooks(),
            origin=state,
            loans=[],
        )
