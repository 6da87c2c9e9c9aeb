"""Cases of the benchmark for one round each: nobody is timed, everyone is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from jacfunc._measuring import Contestant, Effort, Result, Run

ONCE = Effort(rounds=1, seconds=0, fewest=1, settling=0)
LEARNT = 18
"""After sixteen settled calls sweeps are written down, and later calls take another way."""


def measured(case: Case, device: str) -> dict[str, Result]:
    """What became of everyone."""
    results = replace(case, effort=ONCE).measure(torch.device(device))
    return {result.contestant: result for result in results}


def learnt(case: Case) -> Case:
    """The case in which ours are judged once they have learnt from calls of before."""
    return replace(case, contestants=tuple(map(_learnt, case.contestants)))


def _learnt(contestant: Contestant[Any]) -> Contestant[Any]:
    if contestant.family != "jacfunc":
        return contestant
    return replace(contestant, prepare=partial(_after_calls, contestant.prepare))


def _after_calls(prepare: Callable[[Any], Run], problem: Any) -> Run:
    run = prepare(problem)
    for _ in range(LEARNT):
        run()
    return run
