"""How many rows of a batch are swept at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(64, 64), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh().mean(1))


class Sweeps(TorchDispatchMode):
    """Counts how often one operation is pulled back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.tanh_backward.default
        return func(*args, **(kwargs or {}))


def test_rows_whose_cotangents_are_a_fourth_of_the_result_are_swept_at_once() -> None:
    x, counts = torch.randn(256, 16, 64), []
    for strategy in (jacfunc.Structured(), jacfunc.Structured(12)):
        jac = jacfunc.module_jacobian(Tokens(), per_sample=True, flat=True, strategy=strategy)
        jac(x)
        with Sweeps() as sweeps:
            result = jac(x)
        counts.append(sweeps.count)
    assert result.nbytes / 5 < 12 * x.nbytes < result.nbytes / 4  # x is as large as what is swept
    assert counts[0] == counts[1]  # each sweep takes milliseconds, whatever it sweeps
