"""Perceptrons of all shapes; some in float64, some wider."""

from itertools import product

from benchmarks.cases import Question, Wanted
from benchmarks.contestants.functions import AUTO, BY_HAND, case
from benchmarks.problems.functions import DOUBLE, SINGLE, mlp

# widths of perceptrons, and how many inputs and outputs they have
SIDES = (4, 16, 64, 256, 1024)
CROSSOVERS = ((64, SINGLE, SIDES), (64, DOUBLE, (16, 256)), (512, SINGLE, (16, 256, 1024)))
QUICK = ((64, SINGLE, 64, 64), (64, SINGLE, 16, 256), (64, SINGLE, 256, 16))
WANTED = (Wanted(AUTO, "time ÷", 1.10, BY_HAND),)

QUESTION = Question(
    "crossover",
    "Reverse, forward or a loop, for a function of N inputs and M outputs?",
    AUTO,
    tuple(
        case(
            f"mlp {width}, {inputs} → {outputs}",
            mlp(inputs, outputs, width),
            {"inputs": inputs, "outputs": outputs, "width": width},
            dtype,
            wanted=WANTED,
            is_quick=(width, dtype, inputs, outputs) in QUICK,
        )
        for width, dtype, sides in CROSSOVERS
        for inputs, outputs in product(sides, sides)
    ),
)
