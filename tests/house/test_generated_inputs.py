"""Any thing in the place of any parameter of any public name: a right answer, or a sentence.

``JACFUNC_BAD_INPUTS=1000`` generates so many calls; by default there are fewer.
"""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

import jacfunc
from tests.kinds.public_names import JUNK, OF_FUNCTIONS, OF_MODULES, OwnError, Public

MANY = settings(
    deadline=None,
    max_examples=int(os.environ.get("JACFUNC_BAD_INPUTS", "250")),
    derandomize=True,
    database=None,
)
NAMES = ("self", "args", "kwargs", "primals")


def parameters(public: Public) -> list[str]:
    """The parameters of a public name, and of the function that it makes."""
    signed = [n for n in inspect.signature(public.signed).parameters if n not in NAMES]
    return list(dict.fromkeys([*signed, *public.good]))


PLACES = [(public, name) for public in [*OF_FUNCTIONS, *OF_MODULES] for name in parameters(public)]


def outcome(public: Public, options: dict[str, Any]) -> Any:
    """What a call returns, or the error that it raises."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return public.call(**{**public.good, **options})
        except Exception as error:
            return error


def says_enough(public: Public, error: Exception) -> bool:
    """Is it in words of the door: what must hold, what came, and what to do?"""
    words = str(error)
    return words.startswith(f"{public.door}: ") and ", got " in words and words.endswith(".")


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other)


def test_every_public_name_is_known() -> None:
    results = {
        "Compilation",
        "Compiled",
        "Estimate",
        "Explanation",
        "GaussNewton",
        "LinearOperator",
        "ModuleResult",
        "Strategy",
    }
    doors = {public.door for public in [*OF_FUNCTIONS, *OF_MODULES]}
    assert doors >= set(jacfunc.__all__) - results


@MANY
@given(st.sampled_from(PLACES), st.sampled_from(sorted(JUNK)))
def test_a_thing_in_a_place(place: tuple[Public, str], junk: str) -> None:
    public, name = place
    found = outcome(public, {name: JUNK[junk]})
    if not isinstance(found, Exception):
        if name in public.free:
            assert_same(found, outcome(public, {}))
        return
    own = isinstance(found, OwnError) or isinstance(found.__cause__, OwnError)
    own = own or callable(JUNK[junk])  # errors of functions pass as they are
    assert own or says_enough(public, found), f"{public.door}({name}={junk}): {found!r}"
