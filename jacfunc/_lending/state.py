"""What a module is made of: tensors by name, lent to it for a call, and all that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jacfunc._errors import Refused
from jacfunc._faults import apart, check_scripted
from jacfunc._lending.constants import Constants, constants_of
from jacfunc._lending.lost import check_fresh
from jacfunc._lending.part import ModulePart, are_same, by_first_name, parts_beside, put_back
from jacfunc._lending.select import Select, chosen
from jacfunc._lending.stay import Lease, Stay
from jacfunc._torch import recording


@dataclass(frozen=True, eq=False)
class ModuleState:
    """Parameters and buffers of a module: those that are differentiated, and the constants."""

    parts: dict[str, ModulePart]  # each once, under its first name
    point: dict[str, Tensor]  # the chosen parameters, with the values to differentiate at
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    beside: list[ModulePart]
    """Objects that the module keeps, and modules that are none of its parts."""
    hidden: dict[str, Tensor]
    """Parameters of these."""
    constants: Constants
    copies: Mapping[int, Tensor] = field(default_factory=dict)
    """Of parameters and buffers as they were, by identity, where these may change."""
    is_held: bool = False
    """Does it answer from what the module was when it was made, whatever became of it?"""
    origin: ModuleState | None = None
    """What a held state was made from: it tells what is known of the module."""
    stays: list[Stay] = field(default_factory=list)
    """The last is the innermost."""

    @classmethod
    def of(cls, api: str, module: nn.Module, select: Select) -> ModuleState:
        parts = {name: ModulePart.of(part) for name, part in module.named_modules()}
        params = by_first_name({name: part.params for name, part in parts.items()})
        buffers = by_first_name({name: part.buffers for name, part in parts.items()})
        for name, tensor in (*params.items(), *buffers.items()):
            if type(tensor) is not nn.Parameter and is_lazy(tensor):
                raise ValueError(
                    f"{api}: the module must know its shapes, got {name}, which is not initialized "
                    "yet. Call the module once before."
                )
        beside = parts_beside(list(parts.values()))
        hidden = {f"(object {number})": part for number, part in enumerate(beside)}
        own = {id(x) for x in (*params.values(), *buffers.values())}
        found = by_first_name({name: part.params for name, part in hidden.items()})
        constants = {name: param for name, param in found.items() if id(param) not in own}
        # after the module's own, of which names are shown
        buffers |= by_first_name({name: part.buffers for name, part in hidden.items()})
        point = chosen(api, params, select)
        return cls(parts, point, params, buffers, beside, constants, constants_of(module))

    @classmethod
    def after(
        cls, before: ModuleState | None, api: str, module: nn.Module, select: Select
    ) -> ModuleState:
        """At a later call: as it was before, unless something else is in a place.

        To look takes a third of what it takes to make it.
        """
        if before is None or not all(map(ModulePart.is_as_at_first, before.every_part)):
            return cls.of(api, module, select)
        point = chosen(api, before.params, select)
        return before if are_same(point, before.point) else replace(before, point=point)

    def held(self) -> ModuleState:
        """With copies of all values, for evaluations after these may have changed."""
        if self.is_held:
            return self
        every = (*self.params.values(), *self.hidden.values(), *self.buffers.values())
        known = {id(x): x for x in every}
        new = dict(known)
        with recording():  # graphs of attributes tell what was computed before
            return replace(
                self,
                parts={name: part.held(new) for name, part in self.parts.items()},
                beside=[part.held(new) for part in self.beside],
                point={name: apart(param) for name, param in self.point.items()},
                copies={key: apart(x) for key, x in known.items()},
                is_held=True,
                origin=self,
                stays=[],
            )

    @property
    def every_part(self) -> list[ModulePart]:
        """Objects and modules beside it among them."""
        return [*self.parts.values(), *self.beside]

    @property
    def module(self) -> nn.Module:
        """The whole."""
        module: nn.Module = self.parts[""].module
        return module

    @property
    def functions(self) -> list[Any]:
        """All that torch calls when the module is called: its parts, and hooks before and after."""
        modules = [part.module for part in self.parts.values()]
        calls = [call for module in modules for call in (type(module).__call__, module.forward)]
        hooks = [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in modules]
        return calls + [hook for some in hooks for hook in some]

    def hooks(self) -> dict[str, list[Any]]:
        """What a user has set on chosen parameters, to change or to look at their gradients."""
        hooks = {name: self.params[name]._backward_hooks for name in self.point}
        return {name: list(some.values()) for name, some in hooks.items() if some}

    def buffers_now(self) -> dict[str, Tensor]:
        """As the module has left them, while it is lent."""
        return dict(self.parts[""].module.named_buffers())

    def check_forward(self) -> None:
        """Refuse forward mode where it would not do as the module does in a backward pass."""
        for name, part in self.parts.items():
            module = part.module
            if part.is_scripted:
                check_scripted(module)
            if module._backward_hooks or module._backward_pre_hooks:
                raise Refused(f"torch's forward mode passes by the backward hooks of {name!r}")

    @contextmanager
    def _at_first(self) -> Iterator[None]:
        """Modes, hooks, parts and attributes as they were when this was made; then as they are."""
        changed = [p for p in self.every_part if not p.is_scripted and not p.is_as_at_first()]
        now = [tables for part in changed for tables in part.as_now()]
        try:
            for part in changed:
                part.give_back(part.attributes)
            yield
        finally:
            put_back(now)

    @contextmanager
    def kept(self, given: Container[str] = (), api: str = "jacfunc") -> Iterator[None]:
        """Whatever evaluations inside do to the module, afterwards it is as it was.

        ``given`` are the names of parameters that evaluations are given anew.

        Raises:
            RuntimeError: if a parameter was written into that was no copy.
        """
        if self.is_held:
            with self._at_first(), self._kept(given, api):
                yield
            return
        with self._kept(given, api):
            yield

    @contextmanager
    def _kept(self, given: Container[str], api: str) -> Iterator[None]:
        every = self.params | self.hidden if self.hidden else self.params
        if self.copies:
            every = {name: self.copies[id(p)] for name, p in every.items()}
        constants = {name: p for name, p in every.items() if name not in given}
        before = self.constants.before(every, constants)
        parts = self.every_part
        stay = Stay(api, parts, [part.now() for part in parts])
        self.stays.append(stay)
        try:
            yield
        except BaseException:
            before.put_back()
            raise
        finally:
            self.stays.pop()
            stay.clear()
            self.constants.end(before)
        before.check(api)

    @contextmanager
    def lent(self, given: Mapping[str, Tensor], arguments: Any = None) -> Iterator[None]:
        """One evaluation, with parameters given anew and the others constant.

        What it writes into meanwhile are copies: of its buffers, and of the tensors, generators
        and containers that it keeps as plain attributes. Parameters are found in these too. What
        it was given stays in place for backward passes that run the module again, until the next
        evaluation or, outside :meth:`kept`, until the end. ``arguments`` are those of the call,
        if it is differentiated by what is given.
        """
        if not self.stays:
            with self.kept(given), self.lent(given, arguments):
                yield
            return
        stay, copies = self.stays[-1], self.copies
        if stay.lease is not None:
            stay.clear()
        new: dict[int, Any] = {id(self.params[name]): param for name, param in given.items()}
        for buffer in self.buffers.values():
            new[id(buffer)] = copies.get(id(buffer), buffer).clone()
        others = {name: p for name, p in self.params.items() if name not in given} | self.hidden
        constants = {name: copies.get(id(p), p) for name, p in others.items()}
        with self.constants.lent(constants, self.parts[""].module.training) as lent:
            for name, param in others.items():
                new[id(param)] = lent[name]
            stay.lease = Lease(given.values(), arguments)
            try:
                for part in stay.parts:
                    part.lend(new)
                yield
            except BaseException:
                stay.clear()
                raise

    def check_fresh(self, outputs: Sequence[Any]) -> None:
        """Refuse outputs of the last evaluation that lead past what it was given.

        Raises:
            Stale: if there are some.
        """
        stay = self.stays[-1]
        if stay.lease is not None and stay.lease.arguments is not None:
            chosen = {id(self.params[name]): name for name in self.point}
            check_fresh(stay.api, outputs, stay.lease.given, stay.lease.arguments, chosen)

    def as_evaluated(self) -> Callable[[], None]:
        """Puts in place what the last evaluation was given, for its pullbacks."""
        lease = self.stays[-1].lease if self.stays else None
        return partial(self._renew, lease)

    def _renew(self, lease: Lease | None) -> None:
        if lease is not None and self.stays:
            self.stays[-1].renew(lease)
