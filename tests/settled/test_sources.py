"""What a sweep may read of an evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jacfunc._settled.following import PlainRecorder
from jacfunc._traces import Sources
from tests.house.calls import is_own, num_calls


def test_tensors_are_told_wherever_an_operation_gets_them() -> None:
    x, weight, bias = torch.ones(2, 3), nn.Parameter(torch.ones(4, 3)), torch.ones(4)
    sources, recorder = Sources(), PlainRecorder()
    recorder.kinds, recorder.arguments = sources.kinds, sources.arguments
    with recorder:
        F.linear(x, weight, bias=bias)
        torch.cat([x, (x + 1)], dim=1)
        torch.stack(tensors=(x, x))
    expected = [(x, weight, bias), (x,), (x, None), (x, x)]
    assert len(sources.arguments) == len(expected)
    for got, those in zip(sources.arguments.values(), expected, strict=True):
        assert len(got) == len(those)
        assert all(b is None or a is b for a, b in zip(got, those, strict=True))
    shapes = [shape for shape, _ in sources.kinds]
    assert shapes == [(2, 3), (4, 3), (4,), (2, 3), (2, 3), (2, 3), (2, 3), (2, 3)]


def test_rows_of_plain_values_are_noted_at_once() -> None:
    def recorded(*rows: Any) -> list[Any]:
        recorder, x = PlainRecorder(), torch.ones(2, 3)
        with recorder:
            for row in rows:
                x.reshape(row)
        return recorder.operations

    reshape = Tensor.reshape
    expected = [(reshape, 2, 3, 2), (reshape, 1, 6), (reshape, 2, 1, 6)]
    assert recorded((3, 2), [6], torch.Size((1, 6))) == [x for row in expected for x in row]
    x, pad = torch.ones(1, 1, 2, 3), F.pad
    with PlainRecorder() as recorder:
        pad(x, (-2, -1))
    # Python gives both numbers the same hash, and signatures are hashes
    assert recorder.operations[1:4] == [2, "minus two", -1]
    with PlainRecorder():
        few, many = (num_calls(partial(pad, x, (1, 1) * n), is_own) for n in (1, 4))
    assert few == many
