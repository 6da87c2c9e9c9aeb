"""What evaluations of one kind have shown of the uses of parameters, and of layouts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

from jacfunc._factored.use import KnownUse
from jacfunc._layouts import Sites, WhatWasSeen
from jacfunc._remembered import MOST_KINDS, CallKind, Remembered
from jacfunc._torch import all_modes


class Outdated(Exception):  # noqa: N818 (the evaluation is repeated, and learns anew)
    """An evaluation uses parameters otherwise than an earlier one of its kind."""


@dataclass
class LearnedUses:
    """How the function uses its parameters, by number, as earlier calls of one kind have shown.

    Args:
        others: parameters that are used where no rule sees it.
        written: parameters that the function writes into.
        ruled: parameters that only operations with rules get, which read them alone; None before
            the first evaluation.
        sites: where tensors of a batch that is evaluated as a whole hold the samples; None before
            they are learned.
        signatures: of the evaluations that these were learned from.
        uses: operations with rules, by number.
        hooked: numbers of operations whose results have hooks, which a pullback to these passes by.
        moves_samples: were numbers moved to where other numbers say, which were not compared
            before? Then layouts may change with the numbers.
        compared_moves: signatures of evaluations that moved numbers to where numbers in these say,
            and after which batches were compared.
        mixes: may operations mix the samples, though the outputs did not show it?
        looked_at: signatures of plain evaluations of which that was seen.
        lessons: how often they were learned.
        is_pulled: has a pullback succeeded?
        refused: names of ways to evaluate the samples that were refused.
    """

    others: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    ruled: set[int] | None = None
    sites: Sites | None = None
    signatures: set[int] = field(default_factory=set)
    uses: dict[int, KnownUse] = field(default_factory=dict)
    hooked: set[int] = field(default_factory=set)
    moves_samples: bool = False
    compared_moves: set[int] = field(default_factory=set)
    mixes: bool = False
    looked_at: set[int] = field(default_factory=set)
    lessons: int = 0
    is_pulled: bool = False
    refused: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, kind: CallKind) -> LearnedUses:
        """What earlier calls of this kind have shown; evaluations add to it."""
        return learned_uses().get_or_make(kind.version, (kind.kind, users_modes()), cls)

    @property
    def lent(self) -> set[int]:
        """Parameters that the function gets without a copy."""
        return (self.ruled or set()) - self.others

    def is_lent(self, number: int) -> bool:
        """Does the function get this parameter without a copy?"""
        return self.ruled is not None and number in self.ruled and number not in self.others

    def copy(self) -> LearnedUses:
        """What is known now."""
        ruled = None if self.ruled is None else set(self.ruled)
        return replace(self, others=set(self.others), written=set(self.written), ruled=ruled)

    def restore(self, before: LearnedUses) -> None:
        """Forget what was learned of uses since then."""
        self.others, self.written, self.ruled = before.others, before.written, before.ruled

    def moves_anew(self, seen: WhatWasSeen) -> bool:
        """Were numbers moved to where others say with which no comparison was made before?"""
        return seen.moves_samples and seen.signature not in self.compared_moves

    def learn_moves(self, seen: WhatWasSeen) -> None:
        """Take in that batches were compared after an evaluation that has moved numbers."""
        if seen.moves_unseen or not seen.moves_samples:
            return
        if len(self.compared_moves) >= MOST_KINDS:
            self.compared_moves.clear()
        self.compared_moves.add(seen.signature)

    def learn_sites(self, sites: Sites, signature: int) -> None:
        """Take in where the tensors of one evaluation hold the samples."""
        if sites != self.sites or len(self.signatures) >= MOST_KINDS:
            self.signatures.clear()
        self.sites = sites
        self.signatures.add(signature)

    def learn(self, count: int, others: set[int], unruled: set[int], written: set[int]) -> bool:
        """Take in what one evaluation of ``count`` parameters showed.

        Returns:
            Whether the evaluation is void, as the function should have got other handles.
        """
        shared = self.others - self.written
        is_void = self.lent & unruled or shared & written or others - self.others
        self.others |= others
        self.written |= written
        self.ruled = (set(range(count)) if self.ruled is None else self.ruled) - unruled
        return bool(is_void)


@cache
def learned_uses() -> Remembered[LearnedUses]:
    """The learned uses of this process, by function, or by module and its version."""
    return Remembered()


def users_modes() -> tuple[type, ...]:
    """The classes of modes of others around, which may change what operations return."""
    kinds = map(type, all_modes())
    return tuple([x for x in kinds if not x.__module__.startswith(("jacfunc.", "torch."))])
