"""Bad inputs get a sentence: the door, what must hold, what came, and what to do.

The rows are in ``tests/kinds/bad_inputs/``, a file for each family of doors.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

from tests.kinds import bad_inputs
from tests.kinds.bad_inputs import Bad

FILES = [name for _, name, _ in pkgutil.iter_modules(bad_inputs.__path__)]
EVERY = [row for file in FILES for row in import_module(f"{bad_inputs.__name__}.{file}").ROWS]
ROWS = {f"{row.door}: {row.name}": row for row in EVERY}


def check_words(door: str, error: BaseException) -> None:
    """Check that an error has the form that all errors of the doors have."""
    words = error.args[0] if isinstance(error, KeyError) else str(error)
    assert words.startswith(f"{door}: "), words
    assert ", got " in words, words
    assert words.endswith("."), words


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_refused_in_words(name: str) -> None:
    row: Bad = ROWS[name]
    with pytest.raises(row.error, match=rf"^[\"']?{row.door}: (?s:.*?){row.words}") as caught:
        row.call()
    check_words(row.door, caught.value)


def test_there_are_enough_rows_each_of_another_name() -> None:
    assert len(ROWS) == len(EVERY) >= 120
