"""The exact diagonal of a Gauss-Newton matrix."""

from functools import partial
from typing import Any

from benchmarks.cases import Case, Question, Wanted, best
from benchmarks.contestants import curvature
from benchmarks.contestants.by_hand import FACTORS
from benchmarks.problems.networks import LARGE, LENET, case

ONE, SOME, FEW, MANY, MOST = 1, 8, 16, 64, 128


def diagonal(network: str, batch: int = MANY, *bounds: float) -> Case:
    """How many times faster than BackPACK, and than through J, is wanted."""
    pairs = zip(bounds, (curvature.BACKPACK, curvature.MATERIALIZED), strict=False)
    faster: Any = partial(Wanted, curvature.OURS, "times faster than")
    names = curvature.MATERIALIZED, FACTORS
    hand = [best(curvature.OURS, batch, *names)] if network == LENET and batch != FEW else []
    return case(
        network,
        batch,
        curvature.DIAGONAL,
        curvature.expected_diagonal,
        baseline=curvature.OURS,
        wanted=(*hand, *(faster(bound, (other,)) for bound, other in pairs)),
        is_quick=batch == FEW,
    )


QUESTION = Question(
    "ggn-diagonal",
    "The exact diagonal of a Gauss-Newton matrix: from the factors of layers, or through J?",
    curvature.OURS,
    (
        *(diagonal(LENET, batch) for batch in (ONE, SOME, FEW)),
        diagonal(LENET, MANY, 1.2, 4.0),
        diagonal(LARGE, MANY, 1.4, 100.0),
        diagonal(LARGE, MOST, 1.4, 100.0),
        diagonal("transformer"),
    ),
)
