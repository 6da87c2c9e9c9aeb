"""A Gauss-Newton matrix times a vector."""

from benchmarks.cases import Question, Wanted
from benchmarks.contestants.curvature import CURVLINOPS, OURS, PRODUCT, expected_product
from benchmarks.problems.networks import LARGE, LENET, case

WANTED = (Wanted(OURS, "time ÷", 1.0, (CURVLINOPS,)),)

QUESTION = Question(
    "ggn-product",
    "A Gauss-Newton matrix times a vector: by which library?",
    OURS,
    tuple(
        case(network, batch, PRODUCT, expected_product, baseline=OURS, wanted=WANTED)
        for network in (LARGE, LENET, "transformer")
        for batch in (8, 64, 128)
    ),
)
