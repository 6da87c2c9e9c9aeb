"""Small functions differentiated again and again: there the Python around each call is the cost."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Question
from benchmarks.contestants.functions import AUTO, JACOBIANS, case
from benchmarks.problems import formulas
from benchmarks.problems.functions import Function, mlp, portable
from benchmarks.problems.judge import Func
from jacfunc._measuring import Effort

CALLS = 50  # of one run, each at another point
EFFORT = Effort(rounds=40, seconds=0.6, fewest=5, patience=3.0)
LEFT_OUT = ("jacfunc forward", "jacfunc looped", "jacfunc reverse in chunks of 128",
            "jacfunc autotune", "autograd expanded, backward once")  # fmt: skip


def arm(draw: Any, xp: Any = torch) -> tuple[Func, Tensor]:
    """Where the hand of a robot is, by the angles of six joints: the first one turns the rest."""
    lengths = abs(draw(5))

    def hand(angles: Any) -> Any:
        leaning = xp.cumsum(angles[1:], 0)
        reach, height = (lengths * xp.sin(leaning)).sum(), (lengths * xp.cos(leaning)).sum()
        return xp.stack([xp.cos(angles[0]) * reach, xp.sin(angles[0]) * reach, height])

    return hand, draw(6)


# a forecast is of one call
CONTESTANTS = tuple(replace(c, forecast=None) for c in JACOBIANS if c.name not in LEFT_OUT)
PROBLEMS: tuple[tuple[str, int, int, Function], ...] = (
    ("mlp 64, 4 → 4", 4, 4, mlp(4, 4, 64)),
    ("mlp 64, 16 → 16", 16, 16, mlp(16, 16, 64)),
    ("orbit, 4 → 4, 5 steps", 4, 4, portable(partial(formulas.orbit, 5))),
    ("robot arm, 6 → 3", 6, 3, portable(arm)),
)

QUESTION = Question(
    "loops",
    "What does one call cost when a small function is differentiated again and again?",
    AUTO,
    tuple(
        case(
            name,
            function,
            {"inputs": inputs, "outputs": outputs, "calls": CALLS},
            contestants=CONTESTANTS,
            effort=EFFORT,
            is_quick=inputs == 16,
        )
        for name, inputs, outputs, function in PROBLEMS
    ),
)
