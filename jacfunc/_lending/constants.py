"""Parameters that a module is not differentiated by: lent without a copy, where it only reads them.

A call also watches them, so that a write into one that was no copy is undone, and told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from jacfunc._memory import COMPARED_BYTES, MOST_COPIED_BYTES
from jacfunc._remembered import Remembered
from jacfunc._torch import below_transforms, is_traced, outside_transforms
from jacfunc._types import Leaves

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
        self._only_read: dict[str, Hashable] = {}
        """By name: mode, and :func:`version_of`, in which a parameter was only read."""

    def watch(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> ParameterWatch:
        """A watch over all parameters during a call, and above all over the constant ones."""
        # detached inside a transform they would be wrapped, and so would all that comes of them
        aliases = {id(p): p.detach() for p in constants.values()}
        watch = ParameterWatch(params, aliases, self._only_read)
        if not (torch.compiler.is_compiling() or is_traced()):
            watch.look(constants, self.compared)
        return watch

    def lent(
        self,
        params: Mapping[str, Tensor],
        mode: bool,
        aliases: Mapping[int, Tensor],
        copied_versions: Mapping[int, Hashable],
    ) -> tuple[dict[str, Tensor], Callable[[], None] | None]:
        """What one evaluation gets for each parameter, by name: a copy, or else its alias.

        Beside it what to call after the evaluation, to learn which copies it has only read; None
        where nothing is copied.

        ``copied_versions`` has, by identity of parameters that are copies themselves, what
        :func:`version_of` gave for the copied ones: what is known of these holds for their copies.
        """
        keys = self._keys_to_copy(params, mode, copied_versions)
        lent = {name: params[name].detach().clone() for name in keys}
        addresses = {name: below_transforms(copy).data_ptr() for name, copy in lent.items()}
        lent |= {
            name: aliases[id(p)] if id(p) in aliases else p.detach()
            for name, p in params.items()
            if name not in keys
        }

        def learn() -> None:
            with outside_transforms():
                for name, key in keys.items():
                    now = below_transforms(lent[name])
                    if now.data_ptr() == addresses[name] and torch.equal(now, params[name]):
                        self._only_read[name] = key

        return lent, learn if keys else None

    def _keys_to_copy(
        self, params: Mapping[str, Tensor], mode: bool, copied_versions: Mapping[int, Hashable]
    ) -> dict[str, Hashable]:
        """Mode and version, by name, of the parameters to copy, as they may be written into.

        Nothing is copied where nobody could tell whether a copy was written into.
        """
        if torch.compiler.is_compiling() or is_traced():
            return {}
        keys: dict[str, Hashable] = {}
        for name, p in params.items():
            key = mode, copied_versions.get(id(p)) or version_of(p)
            if self._only_read.get(name) != key and _is_plain(p) and not p.is_meta:
                keys[name] = key
        return keys if sum(params[name].nbytes for name in keys) <= self.most_copied else {}


@cache
def _constants() -> Remembered[Constants]:
    return Remembered()


def constants_of(module: nn.Module) -> Constants:
    """What earlier calls have found out about the module; nothing at first."""
    return _constants().get_or_make(module, None, Constants)


def version_of(param: Tensor) -> Hashable:
    """Identity of a parameter, and how often torch has written into it."""
    return id(param), 0 if param.is_inference() else param._version


def _is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) and below_transforms(param) is param


def versions_of(params: Iterable[Tensor]) -> list[int]:
    """How often torch has written into each tensor; no call for each, as every call asks."""
    return [0 if param.is_inference() else param._version for param in params]


@dataclass(slots=True)
class ParameterWatch:
    """Parameters as they were before a call, to find what was written into, and to undo it."""

    params: Mapping[str, Tensor]
    aliases: Mapping[int, Tensor]
    """Constants without their graph, by identity: what evaluations get where nothing is copied."""
    only_read: dict[str, Hashable]
    versions: list[int] = field(default_factory=list)
    """Raised by operations of torch."""
    numbers: list[tuple[str, Tensor, bool]] = field(default_factory=list)
    """Names, and numbers of each parameter that is lent without a copy, in a row if they lie so;
    are they all that it has?"""
    copies: Leaves = ()
    """Copies of these numbers, which tell of writes that raise no version. Those of one dtype are
    in one tensor: an operation for each parameter would take a microsecond for each."""

    def look(self, constants: Mapping[str, Tensor], compared: int) -> None:
        """Keep versions, copies of constants of so many bytes, and some numbers of the others."""
        self.versions = versions_of(self.params.values())
        left = compared
        for name, param in constants.items():
            if param.is_cpu and _is_plain(param):
                alias, is_small = self.aliases[id(param)], param.nbytes <= left
                left -= param.nbytes if is_small else 0
                numbers = alias if is_small else _a_few(alias)
                is_row = numbers.dim() == 1 or not numbers.is_contiguous()
                row = numbers if is_row else numbers.view(-1)
                self.numbers.append((name, row, is_small))
        self.copies = self._rows()

    def _rows(self) -> Leaves:
        """The numbers as they are now, in one tensor for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, numbers, _ in self.numbers:
            row = numbers if numbers.dim() == 1 else numbers.reshape(-1)
            by_dtype.setdefault(numbers.dtype, []).append(row)
        return tuple(map(torch.cat, by_dtype.values()))

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
        changed = {} if all(map(torch.equal, self._rows(), self.copies)) else self._restored()
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
        for name, now, is_whole in self.numbers:
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
