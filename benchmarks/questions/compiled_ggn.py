"""A Gauss-Newton matrix times a vector, compiled, in units of one gradient."""

from benchmarks.cases import Question, Wanted
from benchmarks.contestants.compiled_products import AT_POINT, CASES, GGN, GRADIENT, expected_ggn
from benchmarks.problems.networks import case

WANTED = (Wanted(AT_POINT, "time ÷", 0.9, (GRADIENT,)),)

QUESTION = Question(
    "compiled-ggn",
    "A Gauss-Newton matrix times a vector, compiled: how many gradients does it cost?",
    AT_POINT,
    tuple(
        case(network, batch, GGN, expected_ggn, baseline=GRADIENT, wanted=WANTED)
        for network, batch in CASES
    ),
)
