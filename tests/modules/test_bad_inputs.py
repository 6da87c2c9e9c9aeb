"""A bad input gets the same sentence from each door for modules."""

from __future__ import annotations

from functools import partial

import pytest
from torch import Tensor

from tests.kinds.bad_inputs import Bad
from tests.kinds.bad_inputs.modules import DOORS, SHARED, Returning, X


def words_of(row: Bad) -> str:
    with pytest.raises(row.error) as caught:
        row.call()
    words = str(caught.value)
    assert words.startswith(f"{row.door}: "), words
    return words.removeprefix(f"{row.door}: ")


def fail(out: Tensor) -> Tensor:
    raise IndexError("too few dimensions")


@pytest.mark.parametrize("name", DOORS)
def test_errors_of_the_module_itself_say_what_it_was_called_with(name: str) -> None:
    """An image without its batch, say: the error stays the module's own, with a note."""
    with pytest.raises(IndexError, match="too few dimensions") as caught:
        DOORS[name](Returning(fail), X)
    (note,) = caught.value.__notes__
    assert note.startswith(f"{name}: the module must run on its inputs, got this error of its own")
    assert "(5, 3)" in note


@pytest.mark.parametrize("what", SHARED)
def test_all_doors_refuse_in_the_same_words(what: str) -> None:
    call, error, words = SHARED[what]
    rows = [Bad(name, what, partial(call, door), error, words) for name, door in DOORS.items()]
    assert len(set(map(words_of, rows))) == 1
