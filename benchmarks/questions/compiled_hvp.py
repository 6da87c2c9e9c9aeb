"""A Hessian times a vector, compiled, in units of one gradient."""

from benchmarks.cases import Question, Wanted
from benchmarks.contestants.compiled_products import AT_POINT, CASES, GRADIENT, HVP
from benchmarks.contestants.second_order import expected
from benchmarks.problems.networks import case

WANTED = (Wanted(AT_POINT, "time ÷", 1.1, (GRADIENT,)),)

QUESTION = Question(
    "compiled-hvp",
    "A Hessian times a vector, compiled: how many gradients does it cost?",
    AT_POINT,
    tuple(
        case(network, batch, HVP, expected, baseline=GRADIENT, wanted=WANTED)
        for network, batch in CASES
    ),
)
