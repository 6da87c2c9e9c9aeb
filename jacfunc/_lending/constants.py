"""Parameters that a module is not differentiated by: lent without a copy, where it only reads them.

A call also watches them, so that a write into one that was no copy is undone, and told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacfunc._memory import COMPARED_BYTES, MOST_COPIED_BYTES, bytes_in
from jacfunc._remembered import Remembered
from jacfunc._torch import below_transforms, is_traced, outside_transforms

_VERSION = attrgetter("_version")
COMPARED_NUMBERS = 16
"""Numbers of each larger parameter that are compared."""


class Constants:
    """What is known of a module's writes into its constant parameters.

    To copy them all for each evaluation would take the memory of the module once more, and a
    tenth of a small one's time. So they are copied until an evaluation has left a copy as it was,
    and again when their values have changed.

    Args:
        most_copied: bytes of constants that are copied; of more, a write is only reported.
        compared: bytes of parameters that each call copies, to compare them afterwards.
    """

    def __init__(
        self, most_copied: int = MOST_COPIED_BYTES, compared: int = COMPARED_BYTES
    ) -> None:
        self.most_copied, self.compared = most_copied, compared
        self.require_grad = False
        """Do they require gradients where the module's own do? Backward passes may ask for some."""
        self._only_read: dict[str, Hashable] = {}
        """By name: mode, identity and version in which a parameter was only read."""
        self._none_to_copy: Any = None
        """Mode, names, identities, versions of parameters of which none had to be copied."""
        self._numbers: Numbers | None = None  # that the last call has watched

    def watch(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> ParameterWatch:
        """A watch over all parameters during a call, and above all over the constant ones."""
        # detached inside a transform they would be wrapped, and so would all that comes of them
        values = constants.values()
        aliases = dict(zip(map(id, values), map(Tensor.detach, values), strict=True))
        watch = ParameterWatch(params, aliases, self._only_read)
        if torch.compiler.is_compiling() or is_traced():
            return watch
        watch.versions = versions_of(params.values())
        if constants:
            numbers = self._numbers
            if numbers is None or not numbers.are_those_of(constants):
                numbers = Numbers.of(constants, aliases, self.compared)
            watch.numbers, watch.copies = numbers, numbers.now()
            self._numbers = numbers if numbers.may_be_kept else None
        return watch

    def lent(
        self,
        params: Mapping[str, Tensor],
        mode: bool,
        aliases: Mapping[int, Tensor],
        copied_versions: Mapping[int, Hashable],
    ) -> tuple[Sequence[Tensor], Callable[[], None] | None]:
        """What one evaluation gets for each parameter, in order: a copy, or else its alias.

        Beside it what to call afterwards, to learn which copies it has only read, if there are any.

        ``copied_versions`` has, by identity of parameters that are copies themselves, identity and
        version of the copied ones: what is known of these holds for their copies.
        """
        keys = self._keys_to_copy(params, mode, copied_versions) if params else {}
        if not keys and len(aliases) == len(params):
            return [*map(aliases.__getitem__, map(id, params.values()))], None
        lent = {name: params[name].detach().clone() for name in keys}
        addresses = {name: below_transforms(copy).data_ptr() for name, copy in lent.items()}
        rest = [(name, p) for name, p in params.items() if name not in keys]
        lent |= {n: aliases[id(p)] if id(p) in aliases else p.detach() for n, p in rest}

        def learn() -> None:
            with outside_transforms():
                for name, key in keys.items():
                    now = below_transforms(lent[name])
                    if now.data_ptr() == addresses[name] and torch.equal(now, params[name]):
                        self._only_read[name] = key

        return [*map(lent.__getitem__, params)], learn if keys else None

    def _keys_to_copy(
        self, params: Mapping[str, Tensor], mode: bool, copied_versions: Mapping[int, Hashable]
    ) -> dict[str, Hashable]:
        """Mode and version, by name, of the parameters to copy, as they may be written into.

        Nothing is copied where nobody could tell whether a copy was written into.
        """
        if torch.compiler.is_compiling() or is_traced():
            return {}
        only_read, versions = self._only_read, versions_of(params.values())
        now = mode, len(only_read), [*params], [*map(id, params.values())], versions
        if now == self._none_to_copy and not copied_versions:
            return {}
        keys: dict[str, Hashable] = {}
        for (name, p), version in zip(params.items(), versions, strict=True):
            key = mode, copied_versions.get(id(p)) or (id(p), version)
            if only_read.get(name) != key and _is_plain(p) and not p.is_meta:
                keys[name] = key
        if sum(params[name].nbytes for name in keys) <= self.most_copied and keys:
            return keys
        self._none_to_copy = None if copied_versions else now
        return {}


@cache
def _constants() -> Remembered[Constants]:
    return Remembered()


def constants_of(module: nn.Module) -> Constants:
    """What earlier calls have found out about the module; nothing at first."""
    return _constants().get_or_make(module, None, Constants)


def _is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) and below_transforms(param) is param


def versions_of(params: Collection[Tensor]) -> list[int]:
    """How often torch has written into each tensor; no call for each, as every call asks."""
    try:
        return [*map(_VERSION, params)]
    except RuntimeError:  # torch counts nothing of inference tensors
        return [0 if param.is_inference() else param._version for param in params]


class Numbers(NamedTuple):
    """Numbers of constant parameters, in memory of these, by which a write into one shows.

    Args:
        each: names, and numbers of each parameter that is lent without a copy, in a row if they lie
            so; are they all that it has?
        now: reads the bytes of the numbers as they are now.
        owners: names and identities of the parameters.
        addresses: where the parameters lie. Nothing else can, as long as these numbers are kept.
        may_be_kept: may later calls use them, although they keep the memory of the parameters?
    """

    each: Sequence[tuple[str, Tensor, bool]] = ()
    now: Callable[[], list[bytes]] = list
    owners: Sequence[Any] = ()
    addresses: Sequence[int] = ()
    may_be_kept: bool = False

    @classmethod
    def of(
        cls, constants: Mapping[str, Tensor], aliases: Mapping[int, Tensor], compared: int
    ) -> Numbers:
        """All numbers of the first ``compared`` bytes of parameters, and some of the others."""
        each, left, params = list[tuple[str, Tensor, bool]](), compared, constants.values()
        for name, param in constants.items():
            if param.is_cpu and _is_plain(param):
                alias, is_small = aliases[id(param)], param.nbytes <= left
                left -= param.nbytes if is_small else 0
                row = alias if is_small else _a_few(alias)
                # not the alias itself, which the module gets
                each.append((name, row.view(-1) if row.is_contiguous() else row, is_small))
        # of others nothing tells that their memory is the same
        are_rows = len(each) == len(constants) and all(p.is_contiguous() for p in params)
        may_be_kept = are_rows and sum(p.nbytes for p in params) <= MOST_COPIED_BYTES
        addresses = list(map(Tensor.data_ptr, params)) if may_be_kept else []
        owners, now = [*constants, *map(id, params)], bytes_in(row for _, row, _ in each)
        return cls(each, now, owners, addresses, may_be_kept)

    def are_those_of(self, constants: Mapping[str, Tensor]) -> bool:
        """Do these parameters still lie where the numbers are?"""
        params = constants.values()
        is_same = self.owners == [*constants, *map(id, params)]
        return is_same and self.addresses == list(map(Tensor.data_ptr, params))


NONE_COMPARED = Numbers()


@dataclass(slots=True)
class ParameterWatch:
    """Parameters as they were before a call, to find what was written into, and to undo it."""

    params: Mapping[str, Tensor]
    aliases: Mapping[int, Tensor]
    """Constants without their graph, by identity: what evaluations get where nothing is copied."""
    only_read: dict[str, Hashable]
    versions: list[int] = field(default_factory=list)
    """Raised by operations of torch."""
    numbers: Numbers = NONE_COMPARED
    copies: Sequence[bytes] = field(default_factory=list)
    """Copies of these numbers, which tell of writes that raise no version."""

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
        now = self.numbers.now()
        changed = {} if now == self.copies else self._restored(now)
        versions = versions_of(self.params.values()) if self.versions else []  # no compiler asks
        if versions != self.versions:
            for name, version, before in zip(self.params, versions, self.versions, strict=True):
                if version != before:
                    changed.setdefault(name, False)
        return changed

    def _restored(self, now: Sequence[bytes]) -> dict[str, bool]:
        """Put back numbers that have changed; by name of the parameter: is it as it was again?"""
        changed, numbers = {}, zip(self.numbers.each, now, self.copies, strict=True)
        for (name, row, is_whole), those, before in numbers:
            if those != before:
                lies_there = len(those) == len(before)
                changed[name] = is_whole and lies_there
                if lies_there:
                    row.copy_(torch.frombuffer(bytearray(before), dtype=row.dtype).view(row.shape))
        return changed


def _a_few(param: Tensor) -> Tensor:
    """A few numbers of a large parameter."""
    step = max(1, param.numel() // COMPARED_NUMBERS)
    return param.view(-1)[::step] if param.is_contiguous() else param[:0]
