"""When batches are compared to see whether samples depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeAlias

from torch.nn.modules import module as torch_module

from jacfunc._errors import Refused
from jacfunc._lending import ModuleState, Version, version_of_loss
from jacfunc._remembered import MOST_KINDS, Recent, Remembered
from jacfunc._samples import Coupling, GradientOf, Subject, coupling, loss_coupling
from jacfunc._torch import is_traced
from jacfunc._types import Leaves

Independent: TypeAlias = Literal[True, "always"] | None
"""None: compare batches now and then. True: samples are known to be independent. ``"always"``:
compare batches at every call."""

MANY_ROWS, MANY_ENTRIES = 128, 2**24
"""With so many outputs of a sample, and so many entries of all samples' Jacobians, a comparison
takes a few hundredths of the time of the Jacobians."""

FEW_CALLS = 8
"""How many samples are evaluated at once where memory is to be spared."""


@dataclass
class KnownCalls:
    """What is known of the calls of one kind: how many there were, and whether they are large."""

    count: int = 0
    is_large: bool = False
    is_compared: bool = False
    """Were many halves compared at the last call?"""
    signatures: set[int] = field(default_factory=set)
    """Operations of evaluations after which batches were compared."""

    @property
    def is_due(self) -> bool:
        """Is the last call the first, the second, the fourth, the eighth, …?"""
        return self.count & (self.count - 1) == 0

    @property
    def is_next_due(self) -> bool:
        """Will the next call be the first, the second, the fourth, the eighth, …?"""
        return self.count & (self.count + 1) == 0


@dataclass(frozen=True)
class Independence:
    """When the samples of a door's calls are compared with those of another batch.

    Args:
        independent: what the user has said.
        at_once: samples that are evaluated together, drawn at random; None for all.
        by_rows: is every output of a sample swept?
        is_thorough: are many halves compared at every call, not at the first alone?
        memory: bytes that a call may take; None if there is no limit.
    """

    independent: Independent = None
    at_once: int | None = None
    by_rows: bool = True
    is_thorough: bool = False
    memory: int | None = None

    @classmethod
    def of(
        cls, api: str, independent: Any, at_once: int | None, by_rows: bool, memory: int | None
    ) -> Independence:
        """Raises ValueError for anything else than None, True and "always"."""
        is_always = isinstance(independent, str) and independent == "always"
        if independent is not None and independent is not True and not is_always:
            raise ValueError(
                f"{api}: independent must be None, True or 'always', got {independent!r}. "
                "Pass True if you know that samples do not depend on each other."
            )
        few = None if at_once is memory is None else max(FEW_CALLS, at_once or 0)
        return cls(independent, few, by_rows, memory=memory)

    def check(
        self, api: str, state: ModuleState, kind: Hashable, subject_of: Callable[[], Subject]
    ) -> None:
        """Refuse a module whose samples depend on each other, where it is time to compare.

        Raises Refused if it returns other numbers each time.
        """
        compare, kind = self._comparison(api, subject_of), _with_hooks(kind)
        self._refuse(
            api, self._what_changes(lambda: _kinds_of(state.version_of_parts), kind, compare)
        )

    def known_at_next(self, state: ModuleState, kind: Hashable) -> KnownCalls | None:
        """What is known of the calls of a kind; None where batches are compared at the next one."""
        if self.independent is True:
            return KnownCalls()
        kinds = _calls_of().get(state.version_of_parts, None)
        calls = None if kinds is None else kinds.get(_with_hooks(kind))
        is_always = self.independent == "always" or (self.by_rows and calls and calls.is_large)
        return None if calls is None or calls.is_next_due or is_always else calls

    def check_evaluation(
        self,
        api: str,
        state: ModuleState,
        kind: Hashable,
        operations: tuple[int, bool],
        subject_of: Callable[[], Subject],
    ) -> bool:
        """Refuse a module whose samples depend on each other, where an evaluation asks to compare.

        It does if it called other operations than those before, or some that may mix samples.

        Args:
            operations: the signature of the evaluation, and whether its operations may mix samples.

        Returns:
            May they mix samples? False in a trace, and where the user says that they do not.
        """
        if self.independent is True:
            return False
        signature, may_mix = operations
        if is_traced():
            self._refuse_traced(api, may_mix)
            return False
        calls = _kinds_of(state.version_of_parts).get(_with_hooks(kind))
        if calls is None or (signature in calls.signatures and not may_mix):
            return may_mix
        if not calls.is_compared:
            self.compare(api, subject_of, calls.count)
            calls.is_compared = True
        if len(calls.signatures) >= MOST_KINDS:
            calls.signatures.clear()
        calls.signatures.add(signature)
        return may_mix

    def compare(self, api: str, subject_of: Callable[[], Subject], number: int = 0) -> None:
        """Refuse a module whose samples depend on each other: many halves are compared now."""
        thorough = replace(self, is_thorough=True)
        self._refuse(api, thorough._comparison(api, subject_of)(number).what)

    def _refuse_traced(self, api: str, may_mix: bool) -> None:
        """Refuse to be traced where every call must compare batches, which reads numbers."""
        if may_mix or self.independent == "always":
            raise ValueError(
                f"{api}: in a trace samples can't be compared with those of another batch, got "
                "operations that may mix samples, or independent='always'. Pass independent=True "
                "if you know that samples do not depend on each other."
            )

    def _comparison(self, api: str, subject_of: Callable[[], Subject]) -> Callable[[int], Coupling]:
        """Compares batches, with the number of the call."""

        def compare(number: int) -> Coupling:
            try:
                return coupling(subject_of(), number, self.is_thorough or number == 1, self.at_once)
            except Refused as refusal:
                raise Refused(
                    f"{api}: per_sample needs samples that can be compared with those of another "
                    f"batch, got a module that can't be: {refusal}. Draw from torch's default "
                    "generators, or pass independent=True to take each sample alone."
                ) from refusal

        return compare

    def _refuse(self, api: str, what: str | None) -> None:
        if what:
            raise ValueError(
                f"{api}: per_sample needs samples that do not depend on each other, got a module "
                f"with {what}. Use module_jacobian without per_sample, which differentiates the "
                "batch as a whole, or pass independent=True to take each sample alone all the "
                "same; give a lone sample a batch of one, x.unsqueeze(0)."
            )

    def check_loss(self, api: str, loss: Any, outputs: Leaves, gradient_of: GradientOf) -> None:
        """Refuse a loss whose gradient in a sample changes with others, where it is time."""
        kind = tuple((out.shape, out.dtype) for out in outputs)

        def compare(number: int) -> Coupling:
            return loss_coupling(gradient_of, outputs, number)

        if self._what_changes(lambda: _kinds_of(version_of_loss(loss)), kind, compare):
            raise ValueError(
                f"{api}: the loss must be a sum or mean over samples, got one whose gradient in "
                "the outputs of a sample changes with those of others. Use a loss that adds up "
                "what it finds of each sample, or pass independent=True to take it as it is."
            )

    def _what_changes(
        self,
        kinds_of: Callable[[], Recent[KnownCalls]],
        kind: Hashable,
        compare: Callable[[int], Coupling],
    ) -> str | None:
        """What changes with the other samples, in words, where it is time to compare.

        That is at the first call of a kind since the module has changed; at the second, fourth,
        eighth, …, as values that nobody sees may have changed; at every call where it costs little.
        """
        if self.independent is True or is_traced():  # what is traced was called before
            return None
        kinds = kinds_of()
        calls = kinds.pop(kind, None) or KnownCalls()
        calls.count += 1
        is_always = self.independent == "always" or (self.by_rows and calls.is_large)
        is_due = calls.is_due or is_always
        calls.is_compared = is_due and (self.is_thorough or calls.count == 1)
        if is_due:
            coupled = compare(calls.count)
            if coupled.what:
                return coupled.what
            calls.is_large = coupled.rows >= MANY_ROWS and coupled.entries >= MANY_ENTRIES
            if not coupled.was_shown:
                calls.count -= 1  # the next call is as good as this one
        kinds.put(kind, calls)
        return None


def now_and_then(state: ModuleState, kind: Hashable, look: Callable[[], None]) -> None:
    """Call ``look`` at the first, second, fourth, eighth, … call of a kind of a module.

    Where it raises, or the module has changed, the next call is a first one.
    """
    if is_traced():  # what is traced was called before
        return
    kinds = _kinds_of(state.version_of_parts)
    calls = kinds.pop(kind, None) or KnownCalls()
    calls.count += 1
    if calls.is_due:
        look()
    kinds.put(kind, calls)


def _with_hooks(kind: Hashable) -> Hashable:
    """A kind of call, beside the hooks that all modules have now."""
    return kind, *torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks


@cache
def _calls_of() -> Remembered[Recent[KnownCalls]]:
    """The known calls of each version of a module or a loss, by kind."""
    return Remembered()


def _kinds_of(version: Version) -> Recent[KnownCalls]:
    return _calls_of().get_or_make(version, None, lambda: Recent(MOST_KINDS))
