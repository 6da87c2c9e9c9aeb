"""First calls on a budget, of networks whose factors take more than their Jacobian: counted bytes.

Each call is of a new module, so that it learns all that there is to learn.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._memory import LARGE, at_most, sparing
from jacfunc._memory.counting import PeakBytes


def convolutional() -> nn.Module:
    """A row of its cotangents takes half of the bytes of its Jacobian."""
    first = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()
    second = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)
    last = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*first, *second, *last, nn.Linear(32, 10))


class Recurrent(nn.Module):
    """The last state of a GRU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x)[0][:, -1])
        return out


def test_a_stream_takes_some_samples_after_the_other() -> None:
    """All samples' graph, and a row of all, would take more than the budget."""
    torch.manual_seed(0)
    model, x = convolutional(), torch.randn(8, 3, 24, 24)
    want = jacfunc.module_jacobian(model, per_sample=True)(x)
    memory = 2 * sum(block.nbytes for block in want.values())
    torch.manual_seed(0)
    ways = {"per_sample": True, "memory": memory, "independent": True}
    stream = jacfunc.stream_jacobian(convolutional(), **ways)
    with PeakBytes() as counter:
        norms = {name: torch.linalg.vector_norm(block) for name, block in stream(x)}
    assert counter.peak <= memory
    for name, block in want.items():
        torch.testing.assert_close(norms[name], torch.linalg.vector_norm(block))


def test_a_curvature_takes_some_columns_after_the_other() -> None:
    """One sample with all columns of its root would take more than the budget."""
    torch.manual_seed(0)
    model, x, y = convolutional(), torch.randn(4, 3, 24, 24), torch.randint(10, (4,))
    want = jacfunc.ggn(model, F.cross_entropy)(x, y).diagonal()
    memory = 1_200_000
    curvature = jacfunc.ggn(model, F.cross_entropy, memory=memory, independent=True)
    curvature(x, y).diagonal()
    with PeakBytes() as counter:
        diagonal = curvature(x, y).diagonal()
    torch.testing.assert_close(diagonal, want)
    assert counter.peak <= memory


@pytest.mark.parametrize("door", [jacfunc.gradient_norms, jacfunc.ggn])
def test_what_few_samples_have_shown_is_not_learned_of_many(door: Any) -> None:
    """To learn where samples are takes more than to evaluate them: chunks that follow do not."""
    torch.manual_seed(0)
    model, memory = convolutional(), 4_000_000
    x, y = torch.randn(18, 3, 24, 24), torch.randint(10, (18,))
    with PeakBytes() as counter:
        asked = door(model, F.cross_entropy, memory=memory)(x, y)
        result = asked.diagonal() if door is jacfunc.ggn else asked
    del result
    assert counter.peak <= memory


def test_groups_of_samples_are_pulled_back_within_a_budget() -> None:
    """Matrices lie between the outputs of a GRU and its inputs, for each step and cotangent."""
    torch.manual_seed(0)
    x = torch.randn(2500, 20, 16)
    memory = 2 * 4 * 10 * x.numel()
    with PeakBytes() as counter:
        jacfunc.module_jacobian(Recurrent(), "inputs", per_sample=True, memory=memory)(x)
    assert counter.peak <= memory


def test_what_is_made_at_once_is_a_small_part_of_the_budget_around() -> None:
    assert at_most(LARGE) == LARGE
    with sparing(2**20):
        assert at_most(LARGE) == 2**15
        with sparing(2**25), sparing(None):
            assert at_most(LARGE) == 2**15
    with sparing(2**25):
        assert at_most(LARGE) == 2**20
        assert at_most(100) == 100
    assert at_most(LARGE) == LARGE


KERNEL = """
import torch, jacfunc
from torch import nn

def bytes_of(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
torch.manual_seed(0)
layers = nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
model, x = nn.Sequential(*layers), torch.randn(200, 256)
torch.ones(3, 3) @ torch.ones(3, 3)
result = 4 * (10 * len(x)) ** 2
before, code = bytes_of("VmRSS"), bytes_of("RssFile")
jacfunc.ntk(model, None, x, memory=2 * result)
print((bytes_of("VmHWM") - before - (bytes_of("RssFile") - code)) / (2 * result))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else says what a process takes")
def test_blocks_of_a_kernel_go_back_as_they_are_freed() -> None:
    """They are larger than what the heap finds free between others."""
    run = [sys.executable, "-W", "ignore", "-c", KERNEL]
    told = subprocess.run(run, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert float(told.stdout) <= 1.04  # Python takes a megabyte at a time for its own objects
