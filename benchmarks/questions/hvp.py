"""A Hessian of a loss times a vector."""

from benchmarks.cases import Question, Wanted
from benchmarks.contestants.second_order import CONTESTANTS, OURS, RIVALS, expected
from benchmarks.problems.networks import LARGE, LENET, case

WANTED = (Wanted(OURS, "time ÷", 1.05, tuple(rival.name for rival in RIVALS)),)

QUESTION = Question(
    "hvp",
    "A Hessian times a vector: in which order of modes, and by whom?",
    OURS,
    tuple(
        case(network, 64, CONTESTANTS, expected, baseline=OURS, wanted=WANTED)
        for network in (LARGE, LENET, "transformer")
    ),
)
