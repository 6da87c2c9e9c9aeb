"""A bad input gets the same sentence from each door for modules."""

from __future__ import annotations

from functools import partial

import pytest

from tests.kinds.bad_inputs import Bad
from tests.kinds.bad_inputs.modules import DOORS, SHARED


def words_of(row: Bad) -> str:
    with pytest.raises(row.error) as caught:
        row.call()
    words = str(caught.value)
    assert words.startswith(f"{row.door}: "), words
    return words.removeprefix(f"{row.door}: ")


@pytest.mark.parametrize("what", SHARED)
def test_all_doors_refuse_in_the_same_words(what: str) -> None:
    call, error, words = SHARED[what]
    rows = [Bad(name, what, partial(call, door), error, words) for name, door in DOORS.items()]
    assert len(set(map(words_of, rows))) == 1
