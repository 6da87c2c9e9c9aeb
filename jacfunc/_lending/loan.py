"""A module on loan: lent once for all sweeps of a call, and within that for each evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._lending.constants import ParameterWatch
from jacfunc._lending.part import Attributes, ModulePart, attributes_of, give_back, lend


@dataclass(eq=False, slots=True)
class EvaluationState:
    """What one evaluation of a module was given, and the attributes that it left behind."""

    params: Iterable[Tensor] = ()
    arguments: Any = None
    attributes: list[Attributes] | None = None
    """None as long as these are in place."""


@dataclass(eq=False, slots=True)
class Loan:
    """A module from when it is lent for a call until everything is as it was before."""

    api: str
    parts: list[ModulePart]
    before: list[Attributes]
    watch: ParameterWatch
    evaluation: EvaluationState | None = None
    """The one whose tensors are in place; None while the attributes are those of before."""

    def lend(self, evaluation: EvaluationState, new: dict[int, Any]) -> None:
        """Put the tensors of an evaluation in place: ``new`` has them by identity of the old."""
        self.evaluation = evaluation
        lend(self.parts, new)

    def take_back(self) -> None:
        """Put everything back; attributes of the last evaluation are kept for its pullbacks."""
        if self.evaluation is not None:
            self.evaluation.attributes = attributes_of(self.parts)
            self.evaluation.params, self.evaluation.arguments = (), None
            self.evaluation = None
        give_back(self.parts, self.before)

    def renew(self, evaluation: EvaluationState) -> None:
        """Put what an earlier evaluation left in place again, for its pullbacks."""
        if self.evaluation is evaluation or evaluation.attributes is None:
            return
        self.take_back()
        give_back(self.parts, evaluation.attributes)
        self.evaluation = evaluation
