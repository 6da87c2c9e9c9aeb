"""A call stays a walk that a reader can follow: it moves seldom from one file to another."""

from __future__ import annotations

import pytest

from tests.house.moves import moves_of, problems

# some more than alone: what other tests have set up is looked through, too
MOST = {
    "jacrev": (17, 26),
    "module_jacobian, per sample": (37, 84),
    "module_jacobian, by inputs": (32, 71),
    "module_jacobian, by layers": (43, 140),
    "ntk": (50, 139),
    "ggn, diagonal": (60, 174),
}


@pytest.mark.parametrize("name", MOST)
def test_calls_move_seldom(name: str) -> None:
    call = problems()[name]
    files, moves = moves_of(call)
    assert files <= MOST[name][0]
    assert moves <= MOST[name][1]
