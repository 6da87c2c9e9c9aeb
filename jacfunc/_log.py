"""The steps of a call, tried, refused or done instead: logged, and collected in trails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

LOG = logging.getLogger("jacfunc")

_TRAILS: ContextVar[tuple[list[str], ...]] = ContextVar("trails", default=())


def note(message: str, *facts: object) -> None:
    """Report a step to the logger ``jacfunc`` at INFO, and to every open trail."""
    if torch.compiler.is_compiling():  # which can't trace a logger
        return
    LOG.info(message, *facts)
    for trail in _TRAILS.get():
        trail.append(message % facts)


def is_heard() -> bool:
    """Does anyone listen? If not, no time is spent on what a note would say."""
    return LOG.isEnabledFor(logging.INFO) or bool(_TRAILS.get())


@contextmanager
def trail() -> Iterator[list[str]]:
    """A list to which steps inside the ``with`` block are added, in order."""
    steps: list[str] = []
    token = _TRAILS.set((*_TRAILS.get(), steps))
    try:
        yield steps
    finally:
        _TRAILS.reset(token)
