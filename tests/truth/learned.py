"""What calls learn of the parameters, for tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jacfunc._factored.learned import LearnedUses, learned_uses


@contextmanager
def learning() -> Iterator[list[LearnedUses]]:
    """What is learned inside the ``with`` block, as far as its transforms are alive at the end."""
    known = {id(uses) for uses in learned_uses().values()}
    learned: list[LearnedUses] = []
    yield learned
    every = [uses for uses in learned_uses().values() if id(uses) not in known]
    learned += [uses for uses in every if uses.ruled is not None]  # of evaluations that were made
