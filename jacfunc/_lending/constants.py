"""Parameters that a module is not differentiated by: lent without a copy, where it only reads them.

A call also watches them, so that a write into one that was no copy is undone, and told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from jacfunc._lending.loan import Numbers, ParameterWatch, is_plain, versions_of
from jacfunc._memory import COMPARED_BYTES, MOST_COPIED_BYTES
from jacfunc._remembered import Remembered
from jacfunc._torch import below_transforms, is_traced, outside_transforms


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
        self._numbers: Numbers | None = None
        """Those that the last call has watched."""

    def watch(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> ParameterWatch:
        """A watch over all parameters during a call, and above all over the constant ones."""
        # detached inside a transform they would be wrapped, and so would all that comes of them
        aliases = {id(p): p.detach() for p in constants.values()}
        watch = ParameterWatch(params, aliases, self._only_read)
        if not (torch.compiler.is_compiling() or is_traced()):
            if self._numbers is None or not self._numbers.are_those_of(constants):
                self._numbers = Numbers.of(constants, aliases, self.compared)
            watch.look(self._numbers)
            if not self._numbers.may_be_kept:
                self._numbers = None
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
        if not keys and len(aliases) == len(params):
            return {name: aliases[id(p)] for name, p in params.items()}, None
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
        only_read, versions = self._only_read, versions_of(params.values())
        for (name, p), version in zip(params.items(), versions, strict=True):
            key = mode, copied_versions.get(id(p)) or (id(p), version)
            if only_read.get(name) != key and is_plain(p) and not p.is_meta:
                keys[name] = key
        return keys if sum(params[name].nbytes for name in keys) <= self.most_copied else {}


@cache
def _constants() -> Remembered[Constants]:
    return Remembered()


def constants_of(module: nn.Module) -> Constants:
    """What earlier calls have found out about the module; nothing at first."""
    return _constants().get_or_make(module, None, Constants)
