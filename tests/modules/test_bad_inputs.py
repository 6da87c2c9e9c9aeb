"""Bad inputs of the doors for modules get a sentence, and the same one from each door."""

from __future__ import annotations

from functools import partial

import pytest

from tests.kinds.bad_inputs import Bad
from tests.kinds.bad_inputs.modules import DOORS, ROWS, SHARED

BY_NAME = {f"{row.door}: {row.name}": row for row in ROWS}


def words_of(row: Bad) -> str:
    with pytest.raises(row.error) as caught:
        row.call()
    words = str(caught.value)
    assert words.startswith(f"{row.door}: "), words
    return words.removeprefix(f"{row.door}: ")


@pytest.mark.parametrize("name", BY_NAME)
def test_bad_inputs_are_refused_in_words(name: str) -> None:
    row = BY_NAME[name]
    with pytest.raises(row.error, match=rf"(?s)^{row.door}: .*?{row.words}") as caught:
        row.call()
    assert ", got " in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("what", SHARED)
def test_all_doors_refuse_in_the_same_words(what: str) -> None:
    call, error, words = SHARED[what]
    rows = [Bad(name, what, partial(call, door), error, words) for name, door in DOORS.items()]
    assert len(set(map(words_of, rows))) == 1


def test_each_row_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(ROWS) >= 300
