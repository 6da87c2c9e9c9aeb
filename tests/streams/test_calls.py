"""What a stream does beside writing its blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jacfunc
from tests.house.calls import is_call, num_calls

WAYS = ("params", "rows", "samples")
evaluated: list[int] = []


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        evaluated.append(len(x))
        return self.head(self.last(self.first(x).relu()).relu().flatten(1))


def calls_of(work):
    """How many functions of Python and C a call of ``work`` calls."""
    return num_calls(work, is_call)


@pytest.mark.parametrize("by", WAYS)
def test_later_streams_take_what_earlier_calls_have_settled(by):
    """As the whole Jacobian does; and small blocks are made while the module is lent once."""
    module, x = Convolutions(), torch.randn(8, 1, 8, 8)
    stream = jacfunc.stream_jacobian(module, by, per_sample=True, independent=True)
    for _ in range(5):
        list(stream(x))
    assert calls_of(lambda: list(stream(x))) < 2500


def test_later_calls_know_how_many_samples_may_be_evaluated_at_once():
    module, x = Convolutions(), torch.randn(20, 1, 8, 8)
    want = jacfunc.module_jacobian(module, per_sample=True)(x)
    stream = jacfunc.stream_jacobian(module, "samples", per_sample=True, independent=True)
    for later in (False, True, True):
        evaluated.clear()
        blocks = list(stream(x))
        assert (evaluated == [20]) == later  # at the first call some are, to see what they take
        found = {name: torch.cat([block[name] for _, block in blocks]) for name in want}
        torch.testing.assert_close(found, want)
