"""A Gauss-Newton matrix times a vector, at a point of which nothing is known.

By hand it takes one evaluation and either a tangent beside it or the pullback of a pullback, and
then one more pullback. What a product takes where the module was evaluated before is shown as a
bound, and beats nobody.
"""

from benchmarks.cases import Case, Question, Wanted, best
from benchmarks.contestants.curvature import (
    CURVLINOPS,
    FORWARD,
    OURS,
    PRODUCT,
    TWICE,
    expected_product,
)
from benchmarks.problems.networks import LARGE, LENET, case

FEW, MANY, MOST = 8, 64, 128


def product(network: str, batch: int) -> Case:
    wanted = [Wanted(OURS, "time ÷", 1.0, (CURVLINOPS,))]
    wanted += [best(OURS, batch, TWICE, FORWARD)] if batch < MOST else []
    return case(network, batch, PRODUCT, expected_product, baseline=OURS, wanted=tuple(wanted))


QUESTION = Question(
    "ggn-product",
    "A Gauss-Newton matrix times a vector: by which library?",
    OURS,
    tuple(
        product(network, batch)
        for network in (LARGE, LENET, "transformer")
        for batch in (FEW, MANY, MOST)
    ),
)
