"""Operations of a later evaluation are compared with those of a known one, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._errors import Refused
from jacfunc._settled.following import Following, PlainRecorder, Steps

LENT = torch.full((3,), 5.0)
"""Stands for a parameter of a user's, of which an evaluation gets no copy."""


def as_known(x: Tensor, y: Tensor) -> Tensor:
    h = F.dropout(x.reshape(2, 3) + y, p=0.0, training=False).sum(1, keepdim=True)
    return torch.cat([h, h], dim=1).add(1)


def learned(func: Callable[..., Any], *args: Any) -> Steps | None:
    """The operations of a function."""
    recorder = Following(Steps(), set(), {})
    with recorder:
        func(*args)
    return recorder.known()


def follows(steps: Steps, func: Callable[..., Any], *args: Any) -> bool:
    """Does a function call the known operations, and no others?"""
    recorder = Following(steps, {id(LENT)}, {})
    with recorder:
        func(*args)
    return recorder.signature == steps.signature


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(6), torch.randn(3)


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a value": lambda x, y: as_known(x.reshape(3, 2).reshape(2, 3), y),
    "a shape": lambda x, y: F.dropout(x.reshape(3, 2) + y[:2], p=0.0, training=False).sum(1),
    "a keyword's value": lambda x, y: F.dropout(x.reshape(2, 3) + y, p=0.5, training=False),
    "a tensor's place": lambda x, y: x.reshape(2, 3) + 1.0,
    "a number's place": lambda x, y: F.dropout(x.reshape(2, 3) + y, p=torch.tensor(0.0)),  # type: ignore[arg-type]
    "one operation more": lambda x, y: as_known(x, y).add(1),
    "one operation less": lambda x, y: torch.cat([x, x], dim=0),
    "nothing": lambda x, y: x,
    "a list": lambda x, y: as_known_with(x, y, lambda h: torch.cat([h, h, h], dim=1)),
    "a class of numbers": lambda x, y: as_known_with(x, y, last=1.0),
}


def as_known_with(
    x: Tensor,
    y: Tensor,
    cat: Callable[[Tensor], Tensor] = lambda h: torch.cat([h, h], dim=1),
    last: float = 1,
) -> Tensor:
    h = F.dropout(x.reshape(2, 3) + y, p=0.0, training=False).sum(1, keepdim=True)
    return cat(h).add(last)


def test_the_known_operations_have_the_known_signature() -> None:
    steps = learned(as_known, *points())
    assert steps is not None
    assert follows(steps, as_known, *points())
    assert follows(steps, as_known_with, *points())
    x, y = points()
    with (plain := PlainRecorder()):
        as_known(x, y)
    assert plain.signature == steps.signature


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_are_told_apart(name: str) -> None:
    steps = learned(as_known, *points())
    assert steps is not None
    try:
        assert not follows(steps, OTHERS[name], *points())
    except TypeError:  # of torch's own, for a tensor in the place of a number
        assert name == "a number's place"
    assert follows(steps, as_known, *points())


def test_a_list_is_read_when_an_operation_gets_it() -> None:
    def reshaped(x: Tensor, shape: list[int], later: list[int]) -> None:
        x.reshape(shape)
        shape[:] = later

    steps = learned(reshaped, torch.ones(6), [2, 3], [6, 1])
    assert steps is not None
    assert follows(steps, reshaped, torch.ones(6), [2, 3], [1, 6])
    assert not follows(steps, reshaped, torch.ones(6), [3, 2], [2, 3])


@pytest.mark.parametrize("func", [Tensor.mul_, torch.Tensor.add])
def test_a_parameter_that_is_no_copy_is_not_given_to_what_may_write(func: Any) -> None:
    steps = learned(lambda x: func(x, 2.0), torch.ones(3))
    assert steps is not None
    assert follows(steps, lambda x: func(x, 2.0), torch.ones(3))
    with pytest.raises(Refused, match="may be written into"):
        follows(steps, lambda x: func(x, 2.0), LENT)
    assert LENT.tolist() == [5.0] * 3


def test_known_reads_and_shapes_of_such_a_parameter_are_let_pass() -> None:
    def read(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.view(weight.shape[0], 1) if weight.is_complex() else weight)

    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    recorder = Following(Steps(), {id(weight)}, {1: F.linear})
    with recorder:
        read(x, weight)
    steps = recorder.known()
    assert steps is not None
    again = Following(steps, {id(weight)}, {1: F.linear})
    with again:
        read(x, weight)
    assert again.signature == steps.signature


def test_tensors_that_operations_get_are_those_of_a_recorder() -> None:
    def got(recorder: PlainRecorder, x: Tensor, y: Tensor) -> tuple[dict[int, Any], list[Any]]:
        recorder.kinds = []
        with recorder:
            as_known(x, y)
        numbers = {n: [t.tolist() for t in those] for n, those in recorder.arguments.items()}
        return numbers, recorder.kinds

    steps, (x, y) = learned(as_known, *points()), points()
    assert steps is not None
    assert got(Following(steps, set(), {}), x, y) == got(PlainRecorder(), x, y)


def test_numbers_that_say_where_others_go_are_not_followed() -> None:
    assert learned(lambda x, index: x[index], torch.ones(3), torch.tensor([1, 0])) is None
    assert learned(lambda x: x[0], torch.ones(3)) is not None
