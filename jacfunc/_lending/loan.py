"""A module on loan for a call, and in that for each evaluation; the watch over its parameters."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacfunc._lending.attributes import containers_in
from jacfunc._lending.part import (
    OF_EVERY_MODULE,
    Attributes,
    ModulePart,
    attributes_of,
    give_back,
    lend,
    put_back,
    put_registries_back,
)
from jacfunc._lending.snapshot import Snapshot
from jacfunc._torch import below_transforms
from jacfunc._types import Leaves

MOST_KEPT_BYTES = 2**24
"""Of parameters of so many bytes views may be kept from call to call."""

COMPARED_NUMBERS = 16
"""Numbers of each larger parameter that are compared."""


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
    before: list[Attributes] | None
    """None if the attributes were those of the snapshot."""
    watch: ParameterWatch
    snapshot: Snapshot
    evaluation: EvaluationState | None = None
    """The one whose tensors are in place; None while the attributes are those of before."""

    def lend(self, evaluation: EvaluationState, new: dict[int, Any]) -> None:
        """Put the tensors of an evaluation in place: ``new`` has them by identity of the old."""
        self.evaluation = evaluation
        lend(self.parts, new)

    def take_back(self) -> None:
        """Put everything back; attributes of the last evaluation are kept for its pullbacks."""
        evaluation, self.evaluation = self.evaluation, None
        if evaluation is not None:
            evaluation.attributes = attributes_of(self.parts) if evaluation.is_kept else []
            evaluation.params, evaluation.arguments = (), None
        if self.before is not None:
            give_back(self.parts, self.before)
            return
        put_registries_back(self.parts)
        if not self.snapshot.is_current():
            give_back(self.parts, [part.attributes for part in self.parts])

    def keep_contents(self) -> EvaluationState:
        """The last evaluation, once what its hooks find in containers is kept for each pullback.

        A hook may take out of a list what another one has put there in the evaluation.
        """
        evaluation = self.evaluation
        assert evaluation is not None
        evaluation.is_kept = True
        if any(part.has_hooks for part in self.parts):
            own = (pair for part in self.parts for pair in vars(part.module).items())
            containers = containers_in(x for key, x in own if key not in OF_EVERY_MODULE)
            modules = [part.module for part in self.parts if part.is_module]
            params = (x for module in modules for x in module._parameters.values())
            containers += [vars(param) for param in params if param is not None]
            evaluation.contents = [(container, copy(container)) for container in containers]
        return evaluation

    def renew(self, evaluation: EvaluationState) -> None:
        """Put what an earlier evaluation left in place again, for its pullbacks."""
        put_back(evaluation.contents)
        if self.evaluation is evaluation or evaluation.attributes is None:
            return
        if self.evaluation is not None:
            self.take_back()
        give_back(self.parts, evaluation.attributes)
        self.evaluation = evaluation


def version_of(param: Tensor) -> Hashable:
    """Identity of a parameter, and how often torch has written into it."""
    return id(param), 0 if param.is_inference() else param._version


def is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) and below_transforms(param) is param


def versions_of(params: Iterable[Tensor]) -> list[int]:
    """How often torch has written into each tensor; no call for each, as every call asks."""
    return [0 if param.is_inference() else param._version for param in params]


class Numbers(NamedTuple):
    """Numbers of constant parameters, in memory of these, by which a write into one shows.

    Args:
        each: names, and numbers of each parameter that is lent without a copy, in a row if they lie
            so; are they all that it has?
        by_dtype: all of one dtype.
        owners: names and identities of the parameters.
        addresses: where the parameters lie. Nothing else can, as long as these numbers are kept.
        may_be_kept: may later calls use them, although they keep the memory of the parameters?
    """

    each: list[tuple[str, Tensor, bool]]
    by_dtype: list[list[Tensor]]
    owners: list[Any]
    addresses: list[int]
    may_be_kept: bool

    @classmethod
    def of(
        cls, constants: Mapping[str, Tensor], aliases: Mapping[int, Tensor], compared: int
    ) -> Numbers:
        """All numbers of the first ``compared`` bytes of parameters, and some of the others."""
        each, left, params = list[tuple[str, Tensor, bool]](), compared, constants.values()
        for name, param in constants.items():
            if param.is_cpu and is_plain(param):
                alias, is_small = aliases[id(param)], param.nbytes <= left
                left -= param.nbytes if is_small else 0
                numbers = alias if is_small else _a_few(alias)
                is_row = numbers.dim() == 1 or not numbers.is_contiguous()
                each.append((name, numbers if is_row else numbers.view(-1), is_small))
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, numbers, _ in each:
            by_dtype.setdefault(numbers.dtype, []).append(numbers)
        # of others nothing tells that their memory is the same
        are_rows = len(each) == len(constants) and all(p.is_contiguous() for p in params)
        may_be_kept = are_rows and sum(p.nbytes for p in params) <= MOST_KEPT_BYTES
        owners = [*constants, *map(id, params)]
        addresses = list(map(Tensor.data_ptr, params)) if may_be_kept else []
        return cls(each, list(by_dtype.values()), owners, addresses, may_be_kept)

    def are_those_of(self, constants: Mapping[str, Tensor]) -> bool:
        """Do these parameters still lie where the numbers are?"""
        params = constants.values()
        is_same = self.owners == [*constants, *map(id, params)]
        return is_same and self.addresses == list(map(Tensor.data_ptr, params))

    def now(self) -> Leaves:
        """The numbers as they are now, in one tensor for each dtype."""
        if self.may_be_kept:  # all are rows
            return tuple(map(torch.cat, self.by_dtype))
        return tuple([torch.cat([x.reshape(-1) for x in each]) for each in self.by_dtype])


NOTHING = Numbers([], [], [], [], False)


@dataclass(slots=True)
class ParameterWatch:
    """Parameters as they were before a call, to find what was written into, and to undo it."""

    params: Mapping[str, Tensor]
    aliases: Mapping[int, Tensor]
    """Constants without their graph, by identity: what evaluations get where nothing is copied."""
    only_read: dict[str, Hashable]
    versions: list[int] = field(default_factory=list)
    """Raised by operations of torch."""
    numbers: Numbers = NOTHING
    copies: Leaves = ()
    """Copies of these numbers, which tell of writes that raise no version. Those of one dtype are
    in one tensor: an operation for each parameter would take a microsecond for each."""

    def look(self, numbers: Numbers) -> None:
        """Keep versions, and copies of the numbers."""
        self.versions = versions_of(self.params.values())
        self.numbers, self.copies = numbers, numbers.now()

    def check(self, api: str) -> None:
        """Put back what was written into.

        Raises:
            RuntimeError: if there was something.
        """
        for name, is_back in self.put_back().items():
            self.only_read.pop(name, None)
            raise RuntimeError(
                f"{api}: a parameter must be read alone, or written into from the first call on, "
                f"got a write into {name!r}, which "
                f"{'was undone' if is_back else 'has changed it'}. "
                "Keep in a buffer what the module changes itself."
            )

    def put_back(self) -> dict[str, bool]:
        """By name, each parameter that has changed: is it as it was again?"""
        changed = {} if all(map(torch.equal, self.numbers.now(), self.copies)) else self._restored()
        # none, where the call was compiled
        now = versions_of(self.params.values()) if self.versions else []
        if now != self.versions:
            for name, version, before in zip(self.params, now, self.versions, strict=True):
                if version != before:
                    changed.setdefault(name, False)
        return changed

    def _restored(self) -> dict[str, bool]:
        """Put back numbers that have changed; by name of the parameter: is it as it was again?"""
        changed, rows = {}, {row.dtype: row for row in self.copies}
        for name, now, is_whole in self.numbers.each:
            row = rows[now.dtype]
            before, rows[now.dtype] = row[: now.numel()].view_as(now), row[now.numel() :]
            if not torch.equal(now, before) and not _are_same_bits(now, before):
                changed[name] = is_whole
                now.copy_(before)
        return changed


def _a_few(param: Tensor) -> Tensor:
    """A few numbers of a large parameter."""
    if not param.is_contiguous():
        return param[:0]
    step = max(1, param.numel() // COMPARED_NUMBERS)
    return param.as_strided((-(-param.numel() // step),), (step,))


def _are_same_bits(numbers: Tensor, others: Tensor) -> bool:
    """Are they equal bit by bit? A nan is not equal to itself."""
    pair = [x.contiguous().view(-1).view(torch.uint8) for x in (numbers, others)]
    return torch.equal(*pair)
