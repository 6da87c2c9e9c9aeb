"""How many rows of a batch are swept at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._factored import FactoredJacobian


def test_rows_whose_cotangents_are_a_fourth_of_the_result_are_swept_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(64, 64), nn.Linear(64, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x).tanh().mean(1))

    write, sweeps = FactoredJacobian.write_rows, []

    def counted(self: FactoredJacobian, cotangents: Any, *args: Any) -> None:
        sweeps.append((len(cotangents[0]), self.nbytes))
        write(self, cotangents, *args)

    monkeypatch.setattr(FactoredJacobian, "write_rows", counted)
    jac = jacfunc.module_jacobian(Tokens(), per_sample=True, flat=True, strategy="structured")
    result = jac(torch.randn(256, 16, 64))
    ((rows, nbytes),) = sweeps  # each takes milliseconds, whatever it sweeps
    assert rows == 12
    assert result.nbytes / 5 < rows * nbytes < result.nbytes / 4
