"""Samples of a settled batch alone, of which Python may read other numbers than of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from jacfunc._calls import OneTensor
from jacfunc._layouts import WhatWasSeen
from jacfunc._lending import ModuleState
from jacfunc._rounding import are_near
from jacfunc._samples import ALONE_ROUNDING
from jacfunc._torch import run_as_written
from jacfunc._trees import Given
from jacfunc._types import Leaves


class SettledModule(Protocol):
    """A module that is evaluated as before, and what it returned."""

    names: Sequence[str]
    size: int
    returned: OneTensor

    def params(self, state: ModuleState) -> Leaves:
        """The chosen parameters."""


def are_alone(
    settled: SettledModule, state: ModuleState, given: Given, out: Tensor, seen: WhatWasSeen
) -> bool:
    """Are outputs those of each sample alone, where what was read may be another thing of that?"""
    numbers = range(settled.size) if seen.reads_values else sorted(seen.apart)
    rows, chosen = list[Tensor](), dict(zip(settled.names, settled.params(state), strict=True))
    for number in numbers:
        own = tuple([x[number : number + 1].clone() for x in given.tensors])
        with state.lent_for_evaluation({n: p.detach().clone() for n, p in chosen.items()}):
            output = run_as_written(given.called(state.module), *own)
        row = settled.returned.tensor_in(output)
        if row is None or row.shape != (1, *out.shape[1:]) or row.dtype != out.dtype:
            return False
        rows.append(row)
    return are_near(out.detach()[[*numbers]], torch.cat(rows), ALONE_ROUNDING, lead=1)
