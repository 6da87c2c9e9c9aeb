"""Parameters that a module is not differentiated by: lent as they are to one that only reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from jacfunc._functorch import below_transforms, outside_transforms
from jacfunc._known import Remembered

MOST = 2**26
"""Bytes of constants that are copied; of more, a write is seen too late, and told."""


class Constants:
    """What a module does with them, as far as it has been seen.

    To copy them all for each call would take the memory of the module once more, and a tenth of
    a small one's time. So they are copied until an evaluation has left a copy as it was, and again
    when their values have changed.
    """

    def __init__(self) -> None:
        self._only_read: dict[int, Hashable] = {}
        """In which mode and version, by identity."""
        self._lent: dict[int, Tensor] = {}

    @contextmanager
    def lent(self, params: Mapping[str, Tensor], mode: bool) -> Iterator[dict[int, Tensor]]:
        """By identity, what the module gets for each; inside, an evaluation gets what is lent.

        Raises:
            RuntimeError: if the module wrote into one that is not a copy.
        """
        outer, is_evaluation = self._lent, bool(self._lent)
        copied = self._copied(params, mode)
        lent = {id(p): p.detach().clone() for p in copied}
        addresses = {key: below_transforms(copy).data_ptr() for key, copy in lent.items()}
        read = {name: p for name, p in params.items() if id(p) not in lent}
        versions = {} if is_evaluation else {name: _version(p) for name, p in read.items()}
        # detached inside a transform they would be wrapped, and so would all that comes of them
        lent |= {id(p): outer[id(p)] if id(p) in outer else p.detach() for p in read.values()}
        self._lent = lent
        try:
            yield lent
        finally:
            self._lent = outer
        for name, version in versions.items():
            _check_unwritten(name, version, read[name])
        if is_evaluation and copied:
            with outside_transforms():
                for p in copied:
                    now = below_transforms(lent[id(p)])
                    if now.data_ptr() == addresses[id(p)] and torch.equal(now, p):
                        self._only_read[id(p)] = mode, _version(p)

    def _copied(self, params: Mapping[str, Tensor], mode: bool) -> list[Tensor]:
        """None where nothing could tell whether it was written into."""
        if torch.compiler.is_compiling():
            return []
        unseen = [p for p in params.values() if self._only_read.get(id(p)) != (mode, _version(p))]
        plain: list[Tensor] = [
            p
            for p in unseen
            if type(p) is nn.Parameter and below_transforms(p) is p and not p.is_meta
        ]
        return plain if sum(p.nbytes for p in plain) <= MOST else []


@cache
def _seen() -> Remembered[Constants]:
    return Remembered()


def constants_of(module: nn.Module) -> Constants:
    """Those of earlier calls, where there were some."""
    constants = _seen().get(module, None)
    if constants is None:
        constants = Constants()
        _seen().put(module, None, constants)
    return constants


def _version(param: Tensor) -> int:
    return 0 if param.is_inference() else param._version


def _check_unwritten(name: str, version: int, param: Tensor) -> None:
    if _version(param) != version:
        raise RuntimeError(
            "a parameter that the module is not differentiated by must be read alone, or written "
            f"into from the first call on, got a write into {name!r}, which has changed it. "
            "Keep in a buffer what the module changes itself."
        )
