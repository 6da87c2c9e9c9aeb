"""Parameters that a module is not differentiated by: lent as they are to one that only reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from jacfunc._remembered import Remembered
from jacfunc._torch import below_transforms, outside_transforms

MOST_BYTES = 2**26
"""Bytes of constants that are copied; of more, a write is seen too late, and told."""
COPIED_BYTES = 2**13
"""Bytes of parameters of which each call keeps a copy to compare them with afterwards."""
COMPARED_NUMBERS = 16
"""Numbers of each larger one that are compared."""


class Constants:
    """What a module does with them, as far as it has been seen.

    To copy them all for each evaluation would take the memory of the module once more, and a
    tenth of a small one's time. So they are copied until an evaluation has left a copy as it was,
    and again when their values have changed.
    """

    def __init__(self) -> None:
        self._only_read: dict[str, Hashable] = {}
        """In which mode and version, by name."""
        self._aliases: dict[int, Tensor] = {}

    def before(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> ParametersBefore:
        """A call begins, to be ended by :meth:`end`."""
        # detached inside a transform they would be wrapped, and so would all that comes of them
        aliases = {id(p): p.detach() for p in constants.values()}
        before = ParametersBefore(params, self._aliases, self._only_read)
        if not torch.compiler.is_compiling():
            before.look(constants, aliases)
        self._aliases = aliases
        return before

    def end(self, before: ParametersBefore) -> None:
        """What was in place before the call is so again."""
        self._aliases = before.outer

    @contextmanager
    def lent(self, params: Mapping[str, Tensor], mode: bool) -> Iterator[dict[str, Tensor]]:
        """By name, what one evaluation gets for each."""
        copied = self._copied(params, mode)
        lent = {name: p.detach().clone() for name, p in copied.items()}
        addresses = {name: below_transforms(copy).data_ptr() for name, copy in lent.items()}
        lent |= {
            name: self._aliases[id(p)] if id(p) in self._aliases else p.detach()
            for name, p in params.items()
            if name not in copied
        }
        yield lent
        if copied:
            with outside_transforms():
                for name, p in copied.items():
                    now = below_transforms(lent[name])
                    if now.data_ptr() == addresses[name] and torch.equal(now, p):
                        self._only_read[name] = mode, id(p), _version(p)

    def _copied(self, params: Mapping[str, Tensor], mode: bool) -> dict[str, Tensor]:
        """None where nothing could tell whether it was written into."""
        if torch.compiler.is_compiling():
            return {}
        known = self._only_read
        unseen = {n: p for n, p in params.items() if known.get(n) != (mode, id(p), _version(p))}
        plain = {name: p for name, p in unseen.items() if _is_plain(p) and not p.is_meta}
        return plain if sum(p.nbytes for p in plain.values()) <= MOST_BYTES else {}


@cache
def _constants() -> Remembered[Constants]:
    return Remembered()


def constants_of(module: nn.Module) -> Constants:
    """Those of earlier calls, where there were some."""
    return _constants().get_or_make(module, None, Constants)


def _is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) and below_transforms(param) is param


def _version(param: Tensor) -> int:
    return 0 if param.is_inference() else param._version


@dataclass(slots=True)
class ParametersBefore:
    """What parameters were before a call."""

    params: Mapping[str, Tensor]
    outer: dict[int, Tensor]
    only_read: dict[str, Hashable]
    versions: list[int] = field(default_factory=list)
    """Raised by operations of torch."""
    numbers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """By name, of what is lent and no copy: these tell of all other writes."""

    def look(self, constants: Mapping[str, Tensor], aliases: Mapping[int, Tensor]) -> None:
        """Copies of small parameters, some numbers of large ones."""
        self.versions = list(map(_version, self.params.values()))
        left = COPIED_BYTES
        for name, param in constants.items():
            if param.device.type == "cpu" and _is_plain(param):
                alias, is_small = aliases[id(param)], param.nbytes <= left
                left -= param.nbytes if is_small else 0
                some = alias if is_small else _some(alias)
                self.numbers.append((name, some, some.clone()))

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
        """Which have changed, and could they be put back as they were?"""
        changed = {}
        for name, now, before in self.numbers:
            if not torch.equal(now, before) and not _are_same_bits(now, before):
                changed[name] = now.shape == self.params[name].shape
                now.copy_(before)
        # none, where the call was compiled
        for version, (name, param) in zip(self.versions, self.params.items(), strict=False):
            if version != _version(param):
                changed.setdefault(name, False)
        return changed


def _some(param: Tensor) -> Tensor:
    """A few numbers of a large parameter."""
    if not param.is_contiguous():
        return param[:0]
    return param.view(-1)[:: max(1, param.numel() // COMPARED_NUMBERS)]


def _are_same_bits(numbers: Tensor, others: Tensor) -> bool:
    """For nan, which is not equal to itself."""
    pair = [x.contiguous().view(-1).view(torch.uint8) for x in (numbers, others)]
    return torch.equal(*pair)
