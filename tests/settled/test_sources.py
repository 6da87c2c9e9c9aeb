"""What a sweep may read of an evaluation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from jacfunc._settled.repeated import PlainRecorder
from jacfunc._settled.sources import Sources


def test_tensors_are_told_wherever_an_operation_gets_them() -> None:
    x, weight, bias = torch.ones(2, 3), nn.Parameter(torch.ones(4, 3)), torch.ones(4)
    sources, recorder = Sources(), PlainRecorder()
    recorder.arguments = sources.arguments
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
