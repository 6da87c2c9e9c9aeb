"""The exact diagonal of a Gauss-Newton matrix."""

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.curvature import (
    BACKPACK,
    DIAGONAL,
    MATERIALIZED,
    OURS,
    expected_diagonal,
)  # fmt: skip
from benchmarks.problems.networks import LARGE, LENET, case

FEW, MANY, MOST = 16, 64, 128


def diagonal(network: str, batch: int = MANY, *bounds: float) -> Case:
    """How many times faster than BackPACK, and than through J, is wanted."""
    return case(
        network,
        batch,
        DIAGONAL,
        expected_diagonal,
        baseline=OURS,
        wanted=tuple(
            Wanted(OURS, "times faster than", bound, (other,))
            for bound, other in zip(bounds, (BACKPACK, MATERIALIZED), strict=False)
        ),
        is_quick=batch == FEW,
    )


QUESTION = Question(
    "ggn-diagonal",
    "The exact diagonal of a Gauss-Newton matrix: from the factors of layers, or through J?",
    OURS,
    (
        diagonal(LENET, FEW),
        diagonal(LENET, MANY, 1.2, 4.0),
        diagonal(LARGE, MANY, 1.4, 100.0),
        diagonal(LARGE, MOST, 1.4, 100.0),
        diagonal("transformer"),
    ),
)
