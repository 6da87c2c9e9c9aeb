"""The state of a module: its tensors and attributes, and how they are lent and given back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jacfunc._arguments import are_plain
from jacfunc._errors import Refused
from jacfunc._faults import check_scripted
from jacfunc._lending.constants import Constants, constants_of
from jacfunc._lending.loan import (
    EvaluationState,
    LentForCall,
    LentForEvaluation,
    Loan,
    as_required,
    renewing,
)
from jacfunc._lending.originals import Casting, Originals
from jacfunc._lending.part import ModulePart, attributes_of, by_first_name, parts_beside, parts_in
from jacfunc._lending.select import Select, select_params
from jacfunc._lending.snapshot import Snapshot, Version, version_at
from jacfunc._lending.stale import check_fresh


@dataclass(frozen=True, eq=False)
class ModuleState:
    """All that a module is made of, as it was at one moment.

    It is lent twice: :meth:`lent_for_call` is around all sweeps of a call, after which it is as it
    was; within that, :meth:`lent_for_evaluation` is around an evaluation with tensors of its own.
    """

    module: nn.Module
    """The module itself."""
    parts: dict[str, ModulePart]
    """Submodules, the module itself among them, each once under its first name."""
    point: dict[str, Tensor]
    """The chosen parameters, with the values to differentiate at."""
    params: dict[str, Tensor]
    """All parameters, each once under its first name."""
    buffers: dict[str, Tensor]
    beside: list[ModulePart]
    """Objects that the module keeps as attributes, modules that are no submodules among them."""
    hidden: dict[str, Tensor]
    """Parameters of the objects beside."""
    snapshot: Snapshot
    """What all of these parts were made of."""
    constants: Constants
    copies: Mapping[int, Tensor] = field(default_factory=dict)
    """Copies of all tensors by identity of the copied one; empty unless ``is_copy``."""
    copied_versions: Mapping[int, Hashable] = field(default_factory=dict)
    """Versions of the tensors that were copied, by identity of the copy."""
    is_copy: bool = False
    """Does it keep copies of all values, so that the module may change meanwhile?"""
    originals: Originals | None = None
    """What must not change, where later answers use the module's own tensors."""
    casting: Casting | None = None
    """Where autocast was on, where answers come later; None where they come at once."""
    hooked: dict[str, list[Any]] | None = None  # what hooks() were, where answers come later
    origin: ModuleState | None = None
    """The state that it was made from: what is known of the module is remembered of that one."""
    loans: list[Loan] = field(default_factory=list)
    """The loans to calls that run, the innermost last."""

    @classmethod
    def of(cls, api: str, module: nn.Module, select: Select) -> Self:
        """The state of a module as it is now.

        Raises:
            ValueError: if a parameter has no shape yet, or nothing is selected.
        """
        parts = parts_in(module)
        params = by_first_name({name: part.params for name, part in parts.items()})
        buffers = by_first_name({name: part.buffers for name, part in parts.items()})
        for name, tensor in (*params.items(), *buffers.items()):
            if type(tensor) is not nn.Parameter and is_lazy(tensor):
                raise ValueError(
                    f"{api}: the module must know its shapes, got {name}, which is not initialized "
                    "yet. Call the module once before."
                )
        hidden = dict[str, Tensor]()
        if beside := parts_beside(list(parts.values())):
            objects = {f"(object {number})": part for number, part in enumerate(beside)}
            own = {id(x) for x in (*params.values(), *buffers.values())}
            of_objects = by_first_name({name: part.params for name, part in objects.items()})
            hidden = {name: param for name, param in of_objects.items() if id(param) not in own}
            # after the module's own, of which names are shown
            buffers |= by_first_name({name: part.buffers for name, part in objects.items()})
        point = select_params(api, params, select)
        snapshot = Snapshot([*parts.values(), *beside])
        known = snapshot, constants_of(module)
        return cls(module, parts, point, params, buffers, beside, hidden, *known)

    @cached_property
    def every_part(self) -> list[ModulePart]:
        """Submodules, and objects beside them."""
        return [*self.parts.values(), *self.beside]

    @cached_property
    def version(self) -> Version:
        """One object for all states that are made of the same objects, so far as these are seen."""
        if self.origin is not None:
            return self.origin.version
        if not (self.beside or [part for part in self.parts.values() if part.is_scripted]):
            return self.version_of_parts
        return version_at(self.module, self.point, self.parts.values(), self.beside)

    @cached_property
    def version_of_parts(self) -> Version:
        """One object for all states of one choice whose submodules are of the same objects."""
        if self.origin is not None:
            return self.origin.version_of_parts
        return version_at(self.module, self.point, self.parts.values())

    @property
    def functions(self) -> list[Any]:
        """What torch calls when the module is called: submodules, and their hooks."""
        modules = [part.module for part in self.parts.values()]
        calls = [call for module in modules for call in (type(module).__call__, module.forward)]
        hooks = [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in modules]
        return calls + [hook for registry in hooks for hook in registry]

    def hooks(self) -> dict[str, list[Any]]:
        """Hooks on gradients that a user has set on chosen parameters, by name."""
        if self.hooked is not None:
            return self.hooked
        return {n: [*h.values()] for n in self.point if (h := self.params[n]._backward_hooks)}

    def buffers_now(self) -> dict[str, Tensor]:
        """The buffers that the module has left, while it is lent for an evaluation."""
        return dict(self.module.named_buffers())

    def check_forward(self) -> None:
        """Refuse forward mode where its derivative would not be that of a backward pass."""
        for name, part in self.parts.items():
            module = part.module
            if part.is_scripted:
                check_scripted(module)
            if module._backward_hooks or module._backward_pre_hooks:
                raise Refused(f"torch's forward mode passes by the backward hooks of {name!r}")

    def lent_for_call(
        self, api: str, chosen: Collection[str] = (), is_current: bool = False
    ) -> AbstractContextManager[None]:
        """Around all sweeps of a call: whatever they do to the module, afterwards it is as it was.

        Evaluations get other tensors for the parameters that are ``chosen``. It ``is_current`` if
        the module was just seen to be in this state.

        Raises:
            RuntimeError: if an evaluation wrote into a parameter that was no copy.
            ValueError: if the module has changed, and this state has no copies to stand for it.
        """
        if self.originals is not None and not self.loans:
            self.originals.check(api)
        is_current = is_current or self.snapshot.is_current()
        if (is_current or not self.is_copy) and (self.casting is None or self.casting.is_now()):
            return self._lent(api, chosen, is_current)
        return self._as_then(api, chosen)

    @contextmanager
    def _as_then(self, api: str, chosen: Collection[str]) -> Iterator[None]:
        """Around a loan of a state that is kept: the module and autocast are as they were."""
        casting = nullcontext() if self.casting is None else self.casting.again()
        restored = self.snapshot.restored() if self.is_copy else nullcontext()
        with casting, restored, self._lent(api, chosen, self.snapshot.is_current()):
            yield

    def _lent(self, api: str, chosen: Collection[str], is_current: bool) -> LentForCall:
        """Around a loan of the module as it is now; it ``is_current`` if that is this state."""
        params, copies = self._every_param, self.copies
        if copies:
            of = map(copies.__getitem__, map(id, params.values()))
            params = dict(zip(params, of, strict=True))
        rest = params.keys() - chosen if chosen else params
        constants = {n: p for n, p in params.items() if n in rest} if chosen else params
        watch, parts = self.constants.watch(params, constants), self.every_part
        before = None if is_current else attributes_of(parts)
        tables = self.snapshot.tables if is_current else [vars(p.refers()) for p in parts]
        return LentForCall(self.loans, Loan(api, parts, tables, before, watch, self.snapshot))

    def lent_for_evaluation(
        self, params: Mapping[str, Tensor], arguments: Any = None
    ) -> AbstractContextManager[None]:
        """Around one evaluation with these parameters; within :meth:`lent_for_call` alone.

        All other parameters are constants, those in plain attributes among them. The module writes
        into copies: of its buffers, and of the tensors, generators and containers that it keeps as
        plain attributes. All tensors stay in place for backward passes that run the module again,
        until the next evaluation. ``arguments`` are those of the evaluation, if it is
        differentiated by ``params``.
        """
        return LentForEvaluation(self.loans, partial(self._lend, params, arguments), self.is_plain)

    def _lend(self, params: Mapping[str, Tensor], arguments: Any) -> Callable[[], None] | None:
        """Put the tensors of an evaluation in place; what is to be called after it, if anything."""
        if (loan := self.loans[-1]).evaluation is not None:
            loan.take_back()
        copies, every, learn = self.copies, self._every_param, None
        olds = map(self.params.__getitem__, params)
        new: dict[int, Any] = dict(zip(map(id, olds), params.values(), strict=True))
        if len(params) < len(every):
            others = {n: p for n, p in every.items() if n not in params} if params else every
            values = {n: copies.get(id(p), p) for n, p in others.items()} if copies else others
            how = self.module.training, loan.watch.aliases, self.copied_versions
            constants, learn = self.constants.lent(values, *how)
            if self.constants.require_grad:
                constants = [*map(as_required, constants, others.values())]
            new.update(zip(map(id, others.values()), constants, strict=True))
        for buffer in self.buffers.values():
            new[id(buffer)] = copies.get(id(buffer), buffer).clone()
        loan.lend(EvaluationState(params.values(), arguments), new, every.values())
        return learn

    @cached_property
    def _every_param(self) -> dict[str, Tensor]:
        """All parameters, and those of the objects beside."""
        return self.params | self.hidden

    @cached_property
    def is_plain(self) -> bool:
        """Has no tensor a class of its own? What containers among attributes hold is not seen."""
        if self.origin is not None:
            return self.origin.is_plain
        tensors = (*self._every_param.values(), *self.buffers.values())
        return are_plain(tensors) and not any(part.plain for part in self.every_part)

    def check_fresh(self, outputs: Sequence[Any]) -> None:
        """Refuse outputs of the last evaluation that depend on parameters by another way.

        Raises:
            Stale: if an output does.
        """
        api, evaluation = self.loans[-1].api, self.loans[-1].evaluation
        if evaluation is not None and evaluation.arguments is not None:
            names = {id(self.params[name]): name for name in self.point}
            check_fresh(api, outputs, evaluation.params, evaluation.arguments, names)

    def as_evaluated(self) -> Callable[[], None]:
        """A function that pullbacks call first: it puts the tensors of this evaluation in place."""
        return renewing(self.loans)
