"""A module on loan: lent once for all sweeps of a call, and within that for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from jacfunc._lending.attributes import containers_in
from jacfunc._lending.constants import ParameterWatch
from jacfunc._lending.part import (
    OF_EVERY_MODULE,
    Attributes,
    ModulePart,
    attributes_of,
    put_back,
)
from jacfunc._lending.snapshot import Snapshot
from jacfunc._torch import Graphs, untracked

_OWN, _VERSION = attrgetter("__dict__"), Graphs.version_of


@dataclass(eq=False, slots=True)
class EvaluationState:
    """What one evaluation of a module was given, and the attributes that it left behind."""

    params: Iterable[Tensor] = ()
    arguments: Any = None
    attributes: list[Attributes] | None = None
    """None as long as these are in place."""
    contents: list[tuple[Any, Any]] = field(default_factory=list)
    """Containers that hooks may change in a backward pass, with copies."""
    is_kept: bool = False
    """May a pullback need its attributes after another evaluation?"""


@dataclass(eq=False, slots=True)
class Loan:
    """A module from when it is lent for a call until everything is as it was before."""

    api: str
    parts: list[ModulePart]
    tables: list[Attributes]
    """The dicts in which the parts have their attributes."""
    before: list[Attributes] | None
    """None if the attributes were those of the snapshot."""
    watch: ParameterWatch
    snapshot: Snapshot
    evaluation: EvaluationState | None = None
    """The one whose tensors are in place; None while the attributes are those of before."""
    versions: list[int] | None = None
    """Versions of the snapshot's tables, when the tensors of the evaluation were put in place."""

    def lend(
        self, evaluation: EvaluationState, new: dict[int, Any], params: Collection[Tensor]
    ) -> None:
        """Put the tensors of an evaluation in place: ``new`` has them by identity of the old.

        Those in the place of ``params`` get the attributes that libraries keep in these.
        """
        if any(map(_OWN, params)):
            for param in params:
                vars(new[id(param)]).update(vars(param))
        self.evaluation, rows = evaluation, self.snapshot.rows
        is_as_then = rows is not None and [*map(_VERSION, rows.tables)] == rows.versions
        for part, own in zip(self.parts, self.tables, strict=True):
            if part.has_tensors:
                part.lend(own, new)
            else:  # as that does, at less cost: most parts are so
                own["_parameters"], own["_buffers"] = {}, {}
        self.versions = [*map(_VERSION, rows.tables)] if rows and is_as_then else None

    def take_back(self) -> None:
        """Put everything back; attributes of the last evaluation are kept for its pullbacks."""
        evaluation, self.evaluation = self.evaluation, None
        if evaluation is not None:
            evaluation.attributes = attributes_of(self.parts) if evaluation.is_kept else []
            evaluation.params, evaluation.arguments = (), None
        if self.before is not None:
            self._give_back(self.before)
            return
        rows, is_untouched = self.snapshot.rows, False
        if rows is not None and self.versions is not None:
            is_untouched = [*map(_VERSION, rows.tables)] == self.versions
        for part, own in zip(self.parts, self.tables, strict=True):
            first = part.attributes
            if part.is_module:
                own["_parameters"], own["_buffers"] = first["_parameters"], first["_buffers"]
            if part.plain or part.is_table:
                lent = [key for key in (*part.plain, "sparse") if key in own and key in first]
                own.update({key: first[key] for key in lent})
        if not self.snapshot.is_current(is_untouched):
            self._give_back([part.attributes for part in self.parts])

    def _give_back(self, attributes: Sequence[Attributes]) -> None:
        """Put attributes in the place of those that the parts have now."""
        for part, own in zip(self.parts, attributes, strict=True):
            part.give_back(own)

    def keep_contents(self) -> EvaluationState:
        """The last evaluation, once what its hooks find in containers is kept for each pullback.

        A hook may take out of a list what another one has put there in the evaluation.
        """
        evaluation = self.evaluation
        assert evaluation is not None
        evaluation.is_kept = True
        if [part for part in self.parts if part.has_hooks]:
            own = (pair for part in self.parts for pair in vars(part.module).items())
            containers = containers_in(x for key, x in own if key not in OF_EVERY_MODULE)
            modules = [part.module for part in self.parts if part.is_module]
            params = (x for module in modules for x in module._parameters.values())
            containers += [vars(param) for param in params if param is not None]
            evaluation.contents = [(container, copy(container)) for container in containers]
        return evaluation

    def renew(self, evaluation: EvaluationState) -> None:
        """Put what an earlier evaluation left in place again, for its pullbacks."""
        if evaluation.contents:
            put_back(evaluation.contents)
        if self.evaluation is evaluation or evaluation.attributes is None:
            return
        if self.evaluation is not None:
            self.take_back()
        self._give_back(evaluation.attributes)
        self.evaluation = evaluation


@dataclass(eq=False, slots=True)
class LentForCall:
    """Around all sweeps of a call. A generator that does this takes three times as long."""

    loans: list[Loan]
    """The loans to calls that run, the innermost last."""
    loan: Loan

    def __enter__(self) -> None:
        self.loans.append(self.loan)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        loan = self.loan
        try:
            if kind is not None:
                loan.watch.put_back()
        finally:
            self.loans.pop()
            loan.take_back()
        if kind is None:
            loan.watch.check(loan.api)


@dataclass(eq=False, slots=True)
class LentForEvaluation:
    """Around one evaluation of a module that is lent for a call."""

    loans: list[Loan]
    lend: Callable[[], Callable[[], None] | None]
    """Puts tensors in place; returns what is to be called afterwards, if anything."""
    is_plain: bool
    """Need nobody who watches the function see what is done to lend it?"""
    learn: Callable[[], None] | None = None

    def __enter__(self) -> None:
        try:
            with untracked() if self.is_plain else nullcontext():
                self.learn = self.lend()
        except BaseException:
            self.loans[-1].take_back()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.loans[-1].take_back()
        elif self.learn is not None:
            self.learn()


def renewing(loans: Sequence[Loan]) -> Callable[[], None]:
    """What puts the last evaluation in place again, in whichever loan is then the innermost."""
    evaluation = loans[-1].keep_contents()
    return lambda: loans[-1].renew(evaluation)


def as_required(constant: Tensor, param: Tensor) -> Tensor:
    """A constant that requires a gradient if the parameter does, though nobody reads it."""
    return constant.detach().requires_grad_() if param.requires_grad else constant
