"""A call stays a walk that a reader can follow: it moves seldom from one file to another."""

from __future__ import annotations

from tests.house.moves import moves_of, problems


def test_jacrev_moves_seldom() -> None:
    files, moves = moves_of(problems()["jacrev"])
    assert files <= 24
    assert moves <= 44
