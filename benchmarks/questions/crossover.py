"""Perceptrons of all shapes; some in float64, some wider."""

from collections.abc import Iterator
from itertools import product

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.functions import AUTO, BASELINE, BY_HAND, JACOBIANS
from benchmarks.problems.functions import DOUBLE, SINGLE, case, mlp

SIDES = (4, 16, 64, 256, 1024)
CROSSOVERS = ((64, SINGLE, SIDES), (64, DOUBLE, (16, 256)), (512, SINGLE, (16, 256, 1024)))
"""Widths of perceptrons, and how many inputs and outputs they have."""

QUICK = ((64, 64), (16, 256), (256, 16))
WANTED = (Wanted(AUTO, "time ÷", 1.10, BY_HAND),)


def cases() -> Iterator[Case]:
    for width, dtype, sides in CROSSOVERS:
        for inputs, outputs in product(sides, sides):
            yield case(
                f"mlp {width}, {inputs} → {outputs}",
                mlp(inputs, outputs, width),
                dtype,
                contestants=JACOBIANS,
                baseline=BASELINE,
                sizes={"inputs": inputs, "outputs": outputs, "width": width},
                wanted=WANTED,
                is_quick=(width, dtype) == (64, SINGLE) and (inputs, outputs) in QUICK,
            )


QUESTION = Question(
    "crossover",
    "Reverse, forward or a loop, for a function of N inputs and M outputs?",
    AUTO,
    tuple(cases()),
)
